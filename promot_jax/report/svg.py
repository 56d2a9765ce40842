"""Charts as SVG: inside a page, whose theme colours them, or as files. The text is deterministic.

Every point has its values in a `<title>`, which browsers show on hover and screen readers read out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from promot_jax.report.html import render

WIDTH, HEIGHT = 480, 320  # of a panel, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 46  # margins for the axes
HUES = 8
_MARKERS = (
    "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1-4 0Z",
    "M-3.8-3.8H3.8V3.8H-3.8Z",
    "M0-5L4.7 3.6H-4.7Z",
    "M0-5.2L4.6 0L0 5.2L-4.6 0Z",
    "M0 5L4.7-3.6H-4.7Z",
    "M-1.7-4.6H1.7V-1.7H4.6V1.7H1.7V4.6H-1.7V1.7H-4.6V-1.7H-1.7Z",
)
_BARRED = ("stairs", "marks")  # kinds of lines whose points have bars
# (light, dark); the hues differ for the colour-blind too, and markers differ in print.
COLORS = {
    "h0": ("#c24400", "#ff8a4c"),
    "h1": ("#0064b0", "#5cb3ff"),
    "h2": ("#007a57", "#35c79a"),
    "h3": ("#a8487f", "#f092c8"),
    "h4": ("#9a6700", "#f0b429"),
    "h5": ("#00788c", "#4fd0e3"),
    "h6": ("#5b46a8", "#a897ff"),
    "h7": ("#6d4c34", "#c9a68a"),
    "ink": ("#1c2330", "#e6e9f0"),
    "dim": ("#5a6372", "#a2abba"),
    "rule": ("#e2e6ee", "#2b3240"),
    "card": ("#ffffff", "#171b24"),
}


@dataclass(frozen=True)
class Point:
    """A value with its text on hover; `low` and `high` (on x `left` and `right`) are the ends of its band or bar."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Line:
    """A line or path."""

    label: str  # in the legend; lines of one label and style share an entry, "" has none
    style: int  # colour and marker of a method or task; -1 is the grey of references
    points: tuple[Point, ...]
    # With markers, or "stairs" (markers, down then right), "marks" (no line), "thin" (dotted, no markers), "dots" (no
    # line, small), "ruled" (dashed, no markers). The first has bands, "stairs" and "marks" have bars.
    kind: str = "line"
    right: bool = False  # whether the right-hand axis measures it
    hollow: bool = False  # whether the first marker is hollow

    @property
    def hue(self) -> str:
        """CSS class of the colour."""
        return "ref" if self.style < 0 else f"h{self.style % HUES}"

    @property
    def marked(self) -> bool:
        """Whether its points have markers."""
        return self.kind in ("line", *_BARRED)

    @property
    def marker(self) -> str:
        """Outline of the markers around (0, 0), one of six: with eight hues, 24 styles differ in hue or marker."""
        return _MARKERS[self.style % len(_MARKERS)]


@dataclass(frozen=True)
class Panel:
    """One plot."""

    x: str  # name of the axis
    y: str  # name of the left-hand axis
    lines: tuple[Line, ...]
    title: str = ""  # above the plot
    right: str = ""  # name of the right-hand axis, "" for none


@dataclass(frozen=True)
class Chart:
    """A figure."""

    name: str  # of the file
    title: str
    alt: str  # description with numbers, for readers who do not see the chart
    panels: tuple[Panel, ...]  # side by side if the width allows
    note: str = ""  # how it is read, under it


def legend(chart: Chart) -> list[Line]:
    """One line per entry of the legend, in order."""
    lines = (line for panel in chart.panels for line in panel.lines if line.label)
    return list({(line.label, line.style): line for line in reversed(list(lines))}.values())[::-1]


def css(*, light: bool = False) -> Markup:
    """The style sheet of charts, with the variables of a page's theme or with the light colours."""
    colors = {name: values[0] if light else f"var(--{name})" for name, values in COLORS.items()}
    return render("chart.css", color=colors, hues=range(HUES))


def plot(chart: Chart, panel: Panel, *, place: tuple[int, int] | None = None) -> Markup:
    """Draws a panel of a chart as an `<svg>` that scales with its container.

    The panels of a chart have the same y axes. `place` is (x, y) in another `<svg>`, None in a page.
    """
    bottom, top = HEIGHT - BOTTOM, TOP if panel.title else 14
    right = WIDTH - (LEFT if panel.right else RIGHT)
    x_values = [value for line in panel.lines for p in line.points for value in (p.x, p.left, p.right)]
    x_axis = _Axis([value for value in x_values if value is not None], LEFT, right, zero=False)
    y_axis, right_axis = (_Axis(_values(chart.panels, side), bottom, top, zero=True) for side in (False, True))
    return render(
        "plot.svg",
        chart=chart,
        panel=panel,
        place=place,
        size=(WIDTH, HEIGHT),
        frame={"left": LEFT, "right": right, "top": top, "bottom": bottom},
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        right_ticks=right_axis.ticks() if panel.right else (),
        series=[_series(line, x_axis, right_axis if line.right else y_axis) for line in panel.lines if line.points],
    )


def document(chart: Chart) -> str:
    """A chart as an SVG file on white, with its title and legend, for Markdown and other programs."""
    columns = min(len(chart.panels), 2)
    rows = -(-len(chart.panels) // columns)
    width, top = WIDTH * columns, 34
    panels = [
        plot(chart, panel, place=(WIDTH * (index % columns), top + HEIGHT * (index // columns)))
        for index, panel in enumerate(chart.panels)
    ]
    x, y, entries = 20.0, top + HEIGHT * rows + 14, []
    for line in legend(chart):
        entry_width = 34 + 7.2 * len(line.label) + 16  # no font to measure: letters are about 7 units wide
        if x > 20 and x + entry_width > width:
            x, y = 20.0, y + 22
        entries.append((line, round(x), y - 7))
        x += entry_width
    return render("figure.svg", chart=chart, size=(width, y + 20), css=css(light=True), plots=panels, legend=entries)


class _Axis:
    """Maps values to positions from `start` to `end`; with `zero`, from round number to round number around 0."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, zero: bool):
        low, high = min(values, default=0.0), max(values, default=0.0)
        if zero:  # a cut or stretched axis would make any change look large
            low, high = min(low, 0.0), max(high, 1.0 if high <= 1 else 10.0)
        high = high if high > low else low + 1
        # The next of 1, 2, 5, 10, ... times a power of ten.
        power = 10.0 ** math.floor(math.log10((high - low) / 5))
        self.step = next(power * n for n in (1, 2, 5, 10) if power * n >= (high - low) / 5 * (1 - 1e-9))
        if zero:
            self.low, self.high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step
        else:
            pad = (high - low) * 0.03
            self.low, self.high = low - pad, high + pad
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        """Position of a value, to a tenth of a unit."""
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions of round values within the axis, and their texts."""
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        values = (round(index * self.step, 10) + 0.0 for index in range(first, last + 1))
        return [(self.at(value), f"{value:,.10g}") for value in values]


def _values(panels: Sequence[Panel], right: bool) -> list[float]:
    lines = [line for panel in panels for line in panel.lines if line.right is right]
    points = [point for line in lines for point in line.points]
    return [value for point in points for value in (point.y, point.low, point.high) if value is not None]


def _series(line: Line, x_axis: _Axis, y_axis: _Axis) -> tuple[Line, str, str, str, list[tuple[float, float, str]]]:
    """Returns the line, its path, that of its band and of its bars ("" for none), and (x, y, text) of each point."""
    points = [(x_axis.at(point.x), y_axis.at(point.y), point.tip) for point in line.points]
    ends = [(x_axis.at(p.x), p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    edge = [(x, y_axis.at(low)) for x, low, _ in ends] + [(x, y_axis.at(high)) for x, _, high in reversed(ends)]
    band = _path(edge) + "Z" if len(ends) > 1 and line.kind == "line" else ""
    bars = ""
    for point, (x, y, _) in zip(line.points, points, strict=True) if line.kind in _BARRED else ():
        if point.low is not None and point.high is not None:
            bars += f"M{x} {y_axis.at(point.low)}V{y_axis.at(point.high)}"
        if point.left is not None and point.right is not None:
            bars += f"M{x_axis.at(point.left)} {y}H{x_axis.at(point.right)}"
    positions = [(x, y) for x, y, _ in points]
    path = _stairs(positions) if line.kind == "stairs" else _path(positions)
    return line, path, band, bars, points


def _path(positions: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in positions)


def _stairs(positions: Sequence[tuple[float, float]]) -> str:
    """A path that goes up or down first, then sideways."""
    (x, y), *others = positions
    return f"M{x} {y}" + "".join(f"V{y}H{x}" for x, y in others)
