"""The figures of how cost grows: measured time and memory, in percent of the first point, beside what is expected."""

from collections.abc import Mapping, Sequence
from typing import Any

from promot_jax.report.svg import Chart, Line, Panel, Point

TIME, MEMORY = 0, 1  # styles


def growth(axis: str, case: Mapping[str, Any]) -> Chart:
    """The chart of one axis of `cost_growth`; the values of the sides are its points."""
    points = [(float(name), side) for name, side in case["sides"].items()]
    seconds = [_median(side, "seconds") for _, side in points]
    memory = [_median(side, "peak_bytes") for _, side in points]
    flops = [_median(side, "expected_flops") for _, side in points]
    rest = memory[0] - _median(points[0][1], "expected_bytes")  # of the process: code, runtime, data
    expected_memory = [rest + _median(side, "expected_bytes") for _, side in points]
    expected_seconds = [seconds[0] * count / flops[0] for count in flops]
    xs = [x for x, _ in points]
    lines = (
        _line("time", TIME, xs, seconds, "s"),
        _line("time, expected", TIME, xs, expected_seconds, "s", kind="ruled"),
        _line("memory", MEMORY, xs, [size / 1e9 for size in memory], "GB"),
        _line("memory, expected", MEMORY, xs, [size / 1e9 for size in expected_memory], "GB", kind="ruled"),
    )
    told = f"From {axis} {xs[0]:g} to {xs[-1]:g} time grows {seconds[-1] / seconds[0]:.2f} times, expected "
    told += f"{expected_seconds[-1] / seconds[0]:.2f}; memory {memory[-1] / memory[0]:.2f} times, expected "
    told += f"{expected_memory[-1] / memory[0]:.2f}."
    panel = Panel(axis.capitalize(), "Percent of the first point", lines)
    return Chart(f"cost_{axis.replace(' ', '_')}", f"Cost against {axis}", told, (panel,))


def _line(label: str, style: int, xs: Sequence[float], values: Sequence[float], unit: str, kind: str = "line") -> Line:
    points = [
        Point(x, 100 * value / values[0], f"{label} at {x:g}: {value:.3g} {unit}")
        for x, value in zip(xs, values, strict=True)
    ]
    return Line(label, style, tuple(points), kind=kind)


def _median(side: Mapping[str, Any], measure: str) -> float:
    return float(side[measure]["median"])
