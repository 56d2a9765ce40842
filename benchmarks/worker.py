"""A side's process: calls one function and writes the measures that it returns as JSON.

python -m benchmarks.worker benchmarks.ours:train_step '{"stage": "finetune", ...}' measures.json
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def command(function: str, settings: object, out: Path | str) -> list[str]:
    """The command of a worker: `function` is "module:name", `settings` its keyword arguments as JSON holds them."""
    return [sys.executable, "-m", "benchmarks.worker", function, json.dumps(settings), str(out)]


def read(out: Path) -> dict[str, float]:
    """The measures that a worker has written."""
    return {name: float(value) for name, value in json.loads(out.read_text("utf-8")).items()}


def main(argv: Sequence[str]) -> None:
    """Calls the function that the arguments name."""
    function, settings, out = argv
    module, name = function.split(":")
    measures = getattr(importlib.import_module(module), name)(**json.loads(settings))
    Path(out).write_text(json.dumps(measures), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
