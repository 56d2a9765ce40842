"""A question, answered by cases; the command line of its script, and the JSON that it leaves."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import harness, machine
from benchmarks.harness import Case
from promot_jax import files

PAIRS = 5  # fewer are for trying a script out


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure as the tables of docs/performance.md show it."""

    title: str  # with its unit
    scale: float = 1.0  # that values are multiplied by


SECONDS = Column("seconds")
PEAK = Column("peak memory, GB", 1e-9)
GROWTH = Column("growth over the loaded model, GB", 1e-9)
MEMORY = {"peak_bytes": PEAK, "growth_bytes": GROWTH}


@dataclasses.dataclass(frozen=True)
class Question:
    """What one script measures."""

    name: str  # of its module and of its JSON
    cases: Callable[[bool], Sequence[Case]]  # given whether it is quick; makes what the cases read
    columns: Mapping[str, Column]  # by measure


def main(question: Question, argv: Sequence[str] | None = None) -> None:
    """Runs a question by its command line."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{question.name}")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how often each side runs")
    parser.add_argument("--quick", action="store_true", help="small work, to try the script out; kept apart")
    options = parser.parse_args(argv)
    answer(question, options.pairs, options.quick)


def answer(question: Question, pairs: int, quick: bool, run: harness.Run = harness.run_process) -> dict[str, Any]:
    """Measures every case and writes `runs/bench/<question>.json`, of a quick run `runs/bench/quick/...`.

    Raises:
        FailedError: a side failed, or did other work than the others.
    """
    began, described = time.monotonic(), machine.describe()
    found: dict[str, Any] = {}
    for case in question.cases(quick):
        found[case.name] = harness.measure(case, pairs, run)
    document: dict[str, Any] = {
        "question": question.name,
        "machine": described,
        "pairs": pairs,
        "quick": quick,
        "seconds": time.monotonic() - began,
        "columns": {name: dataclasses.asdict(column) for name, column in question.columns.items()},
        "ratios": {key: value for result in found.values() for key, value in result["ratios"].items()},
        "ranges": {key: value for result in found.values() for key, value in result["ranges"].items()},
        "cases": found,
    }
    folder = harness.FOLDER / "quick" if quick else harness.FOLDER
    files.write(document, folder / f"{question.name}.json")
    for key, ratio in document["ratios"].items():
        print(f"{key} {ratio:.3f}", flush=True)
    return document
