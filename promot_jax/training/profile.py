"""Profiles some updates of a stage (`Training.profile`): XLA's trace, and a page of text that says where the time goes.

The trace lies in `<stage>/profile/plugins/profile/`, for TensorBoard's profile plugin, xprof or Perfetto;
`<stage>/profile/summary.txt` is the page.
"""

import contextlib
import re
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from promot_jax import files
from promot_jax.distributed import hosts

FOLDER = "profile"
SUMMARY = "summary.txt"
LONGEST = 25  # operations on the page


class Operation(NamedTuple):
    """One execution of an XLA operation on one thread or device."""

    name: str
    start: float  # seconds
    end: float


class Profile:
    """Traces the updates from the first to the last step that is given; the loop runs every update in `step`."""

    def __init__(self, folder: Path, name: str, steps: Sequence[int]):
        """Prepares the profile.

        Args:
            folder: of the stage.
            name: of the stage.
            steps: first and last, or none. A resumed run profiles what is left of them.
        """
        self._folder, self._name = folder / FOLDER, name
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._seconds: list[float] = []
        self._ends: list[float] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Runs one update; writes the summary after the last of them."""
        if number not in self._steps:
            yield
            return
        if not self._seconds:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._began = time.perf_counter()
        began = time.perf_counter()
        try:
            with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
                yield
        except BaseException:
            jax.profiler.stop_trace()
            raise
        self._seconds.append(time.perf_counter() - began)
        if number == self._steps[-1]:
            whole = time.perf_counter() - self._began
            jax.profiler.stop_trace()
            if hosts.is_writer():
                self._write(number, whole)

    def _write(self, last: int, whole: float) -> None:
        between = (whole - sum(self._seconds)) / max(len(self._seconds) - 1, 1)
        title = f"Updates {last - len(self._seconds) + 1} to {last} of stage {self._name}"
        trace = max(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        text = summary(title, self._seconds, between, operations(trace))
        path = files.write_text(self._folder / SUMMARY, text + f"\nTrace: {trace.parent}\n")
        print(f"[{self._name}] profile of updates up to {last}: {path}", flush=True)


def operations(trace: Path) -> list[list[Operation]]:
    """The XLA operations in a trace file, for each thread (CPU) or device that ran some."""
    threads = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            found = [
                Operation(event.name, event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9)
                for event in line.events
                if line.name == "XLA Ops" or any(name == "hlo_op" for name, _ in event.stats)
            ]
            threads += [found] if found else []
    return threads


def self_seconds(thread: Iterable[Operation]) -> dict[str, tuple[float, int]]:
    """Seconds and executions of each operation of a thread, without those of operations that ran within it (loops)."""
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    around: list[Operation] = []
    for operation in sorted(thread, key=lambda one: (one.start, -one.end)):
        while around and around[-1].end <= operation.start:
            around.pop()
        length = operation.end - operation.start
        seconds[operation.name] += length
        calls[operation.name] += 1
        if around:
            seconds[around[-1].name] -= length
        around.append(operation)
    return {name: (seconds[name], calls[name]) for name in calls}


def summary(title: str, seconds: Sequence[float], between: float, threads: Iterable[Iterable[Operation]]) -> str:
    """The page.

    Args:
        title: what was profiled.
        seconds: of each update.
        between: seconds from one update to the next: the batch, progress lines, checkpoints.
        threads: the operations, by thread.
    """
    totals = _summed(item for thread in threads for item in self_seconds(thread).items())
    kinds = _summed((re.sub(r"[.\d]+$", "", name), value) for name, value in totals.items())
    count = len(seconds)
    lines = [
        f"{title}.",
        "",
        f"seconds per update     {statistics.median(seconds):.3f}  ({min(seconds):.3f} to {max(seconds):.3f})",
        f"between two updates    {between:.3f}  (next batch, progress lines)",
        f"in XLA's operations    {sum(more for more, _ in totals.values()) / count:.3f}  (all threads and devices)",
        *_memory(),
        "",
        "By kind, per update; an operation that contains others, such as a loop, counts without them:",
        "",
        *_table(kinds, count),
        "",
        f"The {LONGEST} longest operations, per update:",
        "",
        *_table(totals, count),
    ]
    return "\n".join(lines) + "\n"


def _summed(items: Iterable[tuple[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Seconds and executions by name, added up."""
    totals: dict[str, tuple[float, int]] = {}
    for name, (seconds, calls) in items:
        before = totals.get(name, (0.0, 0))
        totals[name] = (before[0] + seconds, before[1] + calls)
    return totals


def _table(totals: Mapping[str, tuple[float, int]], updates: int) -> list[str]:
    """Share, seconds and executions of the longest, per update."""
    whole = sum(more for more, _ in totals.values()) or 1.0
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:LONGEST]
    rows = [
        f"{100 * more / whole:5.1f} %  {more / updates:9.4f} s  {calls / updates:8.4g} x  {name[:80]}"
        for name, (more, calls) in longest
    ]
    return rows or ["  none: no operation was recorded"]


def _memory() -> list[str]:
    """The peak of this process, and of the first device where it counts its own."""
    lines = [f"peak of the process    {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"]
    device: Any = jax.local_devices()[0]
    counted = device.memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        lines.append(f"peak of {device.device_kind}    {counted['peak_bytes_in_use'] / 2**30:.2f} GiB")
    return lines
