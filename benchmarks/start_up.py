"""Seconds of `--help` and of imports, against those of transformers, peft and lm-eval.

Time: 3 minutes on two cores; --quick --pairs 1: 1 minute.
"""

import sys
from collections.abc import Sequence

from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import SECONDS, Question, main

HELP: dict[str, tuple[str, ...]] = {
    "promot_jax --help": ("-m", "promot_jax.main", "--help"),
    "promot_jax --gin_file=promot.gin --help": ("-m", "promot_jax.main", "--gin_file=promot.gin", "--help"),
    "lm_eval --help": ("-m", "lm_eval", "--help"),
}
IMPORTS: dict[str, str] = {
    "import promot_jax.main": "import promot_jax.main",
    "import promot_jax.training.loop": "import promot_jax.training.loop",
    "import jax": "import jax",
    "import transformers, AutoModelForCausalLM": "from transformers import AutoModelForCausalLM",
    "import peft": "import peft",
}


def cases(quick: bool) -> Sequence[Case]:
    """The commands, and the imports; a quick run is the same."""
    imports: dict[str, tuple[str, ...]] = {name: ("-c", code) for name, code in IMPORTS.items()}
    first, *_, lm_eval = HELP
    ratios = Ratio("help_s", "seconds", first), Ratio("help_vs_lm_eval", "seconds", first, lm_eval)
    return [
        Case("--help", _sides(HELP), ratios),
        Case("imports", _sides(imports), (Ratio("import_s", "seconds", next(iter(IMPORTS))),)),
    ]


def _sides(arguments: dict[str, tuple[str, ...]]) -> tuple[Side, ...]:
    commands = {name: {"command": [sys.executable, *rest]} for name, rest in arguments.items()}
    return tuple(Side(name, "benchmarks.commands:run", settings) for name, settings in commands.items())


QUESTION = Question("start_up", cases, {"seconds": SECONDS})

if __name__ == "__main__":
    main(QUESTION)
