"""Times whole commands: a job, a `--help`, and what a command prints."""

import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.steps import WARM_UP

Measures = dict[str, float]


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measures:
    """Runs a command to its end: `seconds`, and the `peak_bytes` of its largest process."""
    began = time.perf_counter()
    subprocess.run(command, env=os.environ | dict(environment or {}), check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def job(command: Sequence[str], outputs: str) -> Measures:
    """Runs a job of this package in a fresh workdir; `characters` are those of the raw outputs in a file of it."""
    with tempfile.TemporaryDirectory() as workdir:
        measures = run([*command, f"--workdir={workdir}/run"])
        lines = (Path(workdir) / "run" / outputs).read_text("utf-8").splitlines()
        return measures | {"characters": sum(len(json.loads(line)["raw"]) for line in lines)}


def until(
    command: Sequence[str], pattern: str, environment: Mapping[str, str] | None = None, workdir: bool = False
) -> Measures:
    """Seconds from the launch of a command to the first line that matches; then it is killed.

    Args:
        command: with its arguments.
        pattern: searched for in each line.
        environment: further variables; "{scratch}" in a value is an empty folder.
        workdir: whether the command is a job of this package, which gets a fresh workdir.
    """
    began = time.perf_counter()
    return {"seconds": _times(command, pattern, 1, environment, workdir)[0] - began}


def updates(command: Sequence[str], stage: str, steps: int) -> float:
    """Median seconds between the progress lines of a training job with a line per update; the first ones compile."""
    marks = _times(command, rf"^\[{stage}\] \d+/", WARM_UP + steps, None, True)[WARM_UP - 1 :]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(marks))


def _times(
    command: Sequence[str], pattern: str, count: int, environment: Mapping[str, str] | None, workdir: bool
) -> list[float]:
    """When a command printed its first `count` lines that match; then it is killed."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        further = {name: value.replace("{scratch}", scratch) for name, value in (environment or {}).items()}
        process = subprocess.Popen(
            [*command, *([f"--workdir={scratch}/run"] if workdir else [])],
            env=os.environ | further,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found += [time.perf_counter()] if re.search(pattern, line) else []
                if len(found) == count:
                    return found
        finally:
            process.kill()
            process.communicate()
    raise RuntimeError(f"{command} ended before it printed {pattern!r} {count} times.")
