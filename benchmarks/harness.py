"""Runs the sides of a case in alternation, each in a process of its own, and compares their measures.

A `Case` has sides, of which the first is usually ours. A side may come in variants: batch sizes of a baseline, compiled
or not. They are raced once, before the pairs, and the fastest takes part, so that every baseline runs at its best.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import worker

Measures = dict[str, float]
Run = Callable[[str, Mapping[str, Any]], Measures]
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "bench"
TIMEOUT = 3600.0  # seconds of one process


class FailedError(Exception):
    """A side's process failed; its last lines are the message."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One program of a comparison."""

    name: str
    function: str  # "module:name", called in a process of its own; it returns measures
    settings: Mapping[str, Any]  # its keyword arguments
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})  # further ones
    optional: bool = False  # whether a variant may fail (a compiler that is not installed) while another does not
    race: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments in the race alone: less work


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A number of the goals: a measure of one side over that of another, or alone."""

    key: str
    measure: str
    of: str  # name of a side
    over: str = ""  # name of a side; "" for the measure itself


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared under one heading."""

    name: str
    sides: tuple[Side, ...]
    ratios: tuple[Ratio, ...]
    race: str = "seconds"  # the measure that variants are chosen by, less is better
    agree: str = ""  # a measure in which the sides that have it must agree, since they do the same work; "" for none
    tolerance: float = 0.01  # relative, of that
    warm_up: tuple[str, ...] = ()  # sides that run once before the pairs, to fill caches
    pairs: int = 0  # at most so many, where a measure does not vary; 0 for as many as are asked for


def run_process(function: str, settings: Mapping[str, Any]) -> Measures:
    """Calls a function in a new process; adds its `wall_seconds`, from launch to exit.

    Raises:
        FailedError: it did not end well.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "measures.json"
        command = worker.command(function, dict(settings), out)
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"{function} ran longer than {TIMEOUT:.0f} s.") from error
        wall = time.perf_counter() - began
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise FailedError(f"{function} ended with status {done.returncode}:\n{tail}")
        measures: Measures = worker.read(out)
    return measures | {"wall_seconds": wall}


def environment() -> dict[str, str]:
    """The environment of all sides: this checkout on the path, no network, and the CPU unless it is set otherwise."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    return {"JAX_PLATFORMS": "cpu", **os.environ, **fixed}


def measure(case: Case, pairs: int, run: Run = run_process) -> dict[str, Any]:
    """Races the variants, then runs the sides in alternation: forwards in one pair, backwards in the next.

    Returns:
        As JSON holds it: `variants` by side with the races, `sides` with every measure's values, median and range,
        `ratios` and `ranges` by key. A ratio is the median over pairs of the quotient within a pair.

    Raises:
        FailedError: a side failed, or did other work than the others.
    """
    pairs = min(pairs, case.pairs or pairs)
    races = {side.name: _race(side, case.race, run) for side in case.sides}
    settings = {side.name: {**side.settings, **side.variants[_fastest(races[side.name])]} for side in case.sides}
    for side in case.sides:
        if side.name in case.warm_up:
            run(side.function, settings[side.name])
    values: dict[str, list[Measures]] = {side.name: [] for side in case.sides}
    for pair in range(pairs):
        for side in case.sides if pair % 2 == 0 else reversed(case.sides):
            values[side.name].append(run(side.function, settings[side.name]))
            _tell(f"{case.name}: pair {pair + 1}/{pairs}, {side.name}: {_shown(values[side.name][-1])}")
    found = {name: _statistics(runs) for name, runs in values.items()}
    _check_agreement(case, found)
    ratios = {ratio.key: _quotients(ratio, values) for ratio in case.ratios}
    return {
        "variants": {name: {"chosen": _fastest(race), "race": race} for name, race in races.items() if len(race) > 1},
        "sides": found,
        "ratios": {key: statistics.median(quotients) for key, quotients in ratios.items()},
        "ranges": {key: [min(quotients), max(quotients)] for key, quotients in ratios.items()},
    }


def _race(side: Side, name: str, run: Run) -> dict[str, float | str]:
    """The measure of each variant, or why it failed; a single variant is not run."""
    if len(side.variants) == 1:
        return dict.fromkeys(side.variants, 0.0)
    found: dict[str, float | str] = {}
    for label, settings in side.variants.items():
        try:
            found[label] = run(side.function, {**side.settings, **settings, **side.race})[name]
        except FailedError as error:
            if not side.optional:
                raise
            found[label] = str(error)
        _tell(f"race of {side.name}, {label}: {found[label]}")
    _fastest(found)
    return found


def _fastest(race: Mapping[str, float | str]) -> str:
    ran = {label: value for label, value in race.items() if isinstance(value, float)}
    if not ran:
        raise FailedError("No variant ran:\n" + "\n".join(map(str, race.values())))
    return min(ran, key=lambda label: ran[label])


def _quotients(ratio: Ratio, values: Mapping[str, Sequence[Measures]]) -> list[float]:
    """The ratio in each pair."""
    above = [run[ratio.measure] for run in values[ratio.of]]
    if not ratio.over:
        return above
    return [mine / run[ratio.measure] for mine, run in zip(above, values[ratio.over], strict=True)]


def _statistics(runs: Sequence[Measures]) -> dict[str, dict[str, Any]]:
    """Of each measure the values, their median, and the lowest and the highest."""
    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}
    return found


def _check_agreement(case: Case, sides: Mapping[str, Mapping[str, Any]]) -> None:
    medians = {name: side[case.agree]["median"] for name, side in sides.items() if case.agree in side}
    low, high = min(medians.values(), default=0.0), max(medians.values(), default=0.0)
    if high - low > case.tolerance * abs(high):
        raise FailedError(f"The sides of {case.name} differ in {case.agree}, so their work is not the same: {medians}.")


def _shown(measures: Measures) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
