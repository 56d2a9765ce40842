"""Charts as SVG: inside a page, whose theme colours them, or as files of their own. Plain text, the same every time.

Every point says its values in a `<title>`, which browsers show on hover and screen readers read out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from promot_jax.report.html import Markup, tag

WIDTH, HEIGHT = 480, 320  # of a panel, in units of its view box
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 46  # room for the axes around the plot
HUES = 8
# (light, dark); the hues are told apart by the colour-blind too, and markers tell them apart in print.
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
CSS = """
.chart { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.chart text { fill: var(--dim); }
.chart .title { fill: var(--ink); font-weight: 600; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart .axis { stroke: var(--dim); stroke-width: 1; }
.chart .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.chart .thin { fill: none; stroke: currentColor; stroke-width: 1.2; stroke-dasharray: 2 3; }
.chart .ruled { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 6 4; }
.chart .band { fill: currentColor; opacity: 0.14; }
.chart .mark { fill: currentColor; stroke: var(--card); stroke-width: 1.2; }
.chart .hollow { fill: var(--card); stroke: currentColor; stroke-width: 2; }
.chart .dot { fill: currentColor; opacity: 0.45; }
.chart .hit { fill: transparent; }
.ref { color: var(--dim); }
""" + "".join(f".h{hue} {{ color: var(--h{hue}); }}\n" for hue in range(HUES))


@dataclass(frozen=True)
class Point:
    """A value with what it says on hover; `low` and `high` are the ends of its band."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points that belong together.

    Attributes:
        label: in the legend; lines of one label and style share an entry, and "" has none.
        style: of a method or task: colour and marker. -1 is the grey of references.
        points: by x, or along a path.
        kind: "line" with markers, "thin" (dotted, no markers), "dots" (no line), or "ruled" (dashed, no markers).
        right: measured on the right-hand axis.
        hollow: whether the first marker is hollow.
    """

    label: str
    style: int
    points: tuple[Point, ...]
    kind: str = "line"
    right: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        x, y: names of the axes.
        lines: what is plotted.
        title: above the plot, "" for none.
        right: name of the right-hand axis, "" for none.
    """

    x: str
    y: str
    lines: tuple[Line, ...]
    title: str = ""
    right: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: of its file.
        title: one line.
        alt: what it shows, with numbers, for readers who do not see it.
        panels: side by side where there is room.
    """

    name: str
    title: str
    alt: str
    panels: tuple[Panel, ...]


def legend(chart: Chart) -> list[Line]:
    """One line per entry of the legend, in order."""
    lines = (line for panel in chart.panels for line in panel.lines if line.label)
    return list({(line.label, line.style): line for line in reversed(list(lines))}.values())[::-1]


def swatch(line: Line) -> Markup:
    """A legend's sample of a line, `[0, 26] x [0, 14]`."""
    stroke = tag("path", d="M1 7H25", class_={"line": "line", "dots": None}.get(line.kind, line.kind))
    marker = _marker(line.style, 13, 7, "mark") if line.kind == "line" else None
    return tag("g", stroke, marker, class_=_hue(line.style))


def plots(chart: Chart) -> list[Markup]:
    """The panels of a chart, each an `<svg>` that scales with its container."""
    return [plot(chart, panel) for panel in chart.panels]


def plot(chart: Chart, panel: Panel, *, x: int | None = None, y: int | None = None) -> Markup:
    """A panel as an `<svg>`; its y axes reach as far as those of the panels beside it.

    Args:
        chart: that the panel is of.
        panel: what to draw.
        x: place in another `<svg>`, None in a page.
        y: likewise.
    """
    bottom, top = HEIGHT - BOTTOM, TOP if panel.title else 14
    right = WIDTH - (LEFT if panel.right else RIGHT)
    xs = _Axis([point.x for line in panel.lines for point in line.points] or [0.0], LEFT, right, zero=False)
    axes = {side: _Axis(_values(chart.panels, side) or [0.0], bottom, top, zero=True) for side in (False, True)}
    parts: list[Markup] = []
    if panel.title:
        parts.append(_text(panel.title, (LEFT + right) / 2, 18, "title"))
    for tick, name in axes[False].ticks():
        parts.append(_rule("grid", LEFT, axes[False].at(tick), right, axes[False].at(tick)))
        parts.append(_text(name, LEFT - 7, axes[False].at(tick) + 4, anchor="end"))
    for tick, name in axes[True].ticks() if panel.right else ():
        parts.append(_text(name, right + 7, axes[True].at(tick) + 4, anchor="start"))
    for tick, name in xs.ticks():
        parts += [_rule("axis", xs.at(tick), bottom, xs.at(tick), bottom + 4), _text(name, xs.at(tick), bottom + 18)]
    parts.append(_rule("axis", LEFT, bottom, right, bottom))
    parts.append(_text(panel.x, (LEFT + right) / 2, HEIGHT - 8))
    for name, place in ((panel.y, 14), (panel.right, WIDTH - 6)):
        if name:
            turned = f"rotate(-90 {place} {(top + bottom) / 2:g})"
            parts.append(
                tag("text", name, x=place, y=f"{(top + bottom) / 2:g}", text_anchor="middle", transform=turned)
            )
    parts += [_drawn(line, xs, axes[line.right]) for line in panel.lines if line.points]
    size: dict[str, Any] = {
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "class_": "chart",
        "role": "img",
        "aria_label": panel.title or chart.title,
    }
    if x is not None:
        size |= {"x": x, "y": y, "width": WIDTH, "height": HEIGHT}
    return tag("svg", *parts, **size)


def document(chart: Chart) -> str:
    """A figure as an SVG file on white, with its title and legend: what Markdown and other programs take."""
    columns = min(len(chart.panels), 2)
    rows = -(-len(chart.panels) // columns)
    width, top = WIDTH * columns, 34
    parts = [tag("title", chart.title), tag("desc", chart.alt)]
    css = CSS
    for name, (light, _) in COLORS.items():
        css = css.replace(f"var(--{name})", light)
    parts.append(tag("style", Markup(css)))
    parts.append(tag("rect", width="100%", height="100%", fill="#ffffff"))
    parts.append(tag("text", chart.title, x=width / 2, y=22, text_anchor="middle", class_="title"))
    for index, panel in enumerate(chart.panels):
        place = {"x": WIDTH * (index % columns), "y": top + HEIGHT * (index // columns)}
        parts.append(plot(chart, panel, **place))
    x, y = 20.0, top + HEIGHT * rows + 14
    for line in legend(chart):
        wide = 34 + 7.2 * len(line.label) + 16  # no font to measure: letters are about 7 units wide
        if x > 20 and x + wide > width:
            x, y = 20.0, y + 22
        name = tag("text", line.label, x=32, y=12)
        parts.append(tag("g", swatch(line), name, transform=f"translate({x:.0f} {y - 7})"))
        x += wide
    box = {"viewBox": f"0 0 {width} {y + 20}", "width": width, "height": y + 20}
    return tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", class_="chart", role="img", **box) + "\n"


class _Axis:
    """Maps values to places, from round number to round number."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, zero: bool):
        low, high = min(values), max(values)
        if zero:  # a cut or stretched axis would make any change look large
            low, high = min(low, 0.0), max(high, 1.0 if high <= 1 else 10.0)
        high = high if high > low else low + 1
        self.step = _round_step((high - low) / 5)
        self.low, self.high = low, high
        if zero:
            self.low, self.high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step
        pad = 0.0 if zero else (high - low) * 0.03
        self.low, self.high = self.low - pad, self.high + pad
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        """Place of a value."""
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Round values within the axis, and how they are written."""
        index = math.ceil(self.low / self.step - 1e-9)
        while index * self.step <= self.high + self.step * 1e-9:
            value = round(index * self.step, 10) + 0.0
            yield value, f"{value:,.10g}"
            index += 1


def _values(panels: Sequence[Panel], right: bool) -> list[float]:
    lines = [line for panel in panels for line in panel.lines if line.right is right]
    points = [point for line in lines for point in line.points]
    return [value for point in points for value in (point.y, point.low, point.high) if value is not None]


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _drawn(line: Line, xs: _Axis, ys: _Axis) -> Markup:
    """Band, line and markers of one line."""
    places = [(xs.at(point.x), ys.at(point.y)) for point in line.points]
    parts: list[Markup | None] = []
    banded = [point for point in line.points if point.low is not None and point.high is not None]
    if len(banded) > 1 and line.kind == "line":
        edge = [(xs.at(point.x), ys.at(point.low)) for point in banded if point.low is not None]
        edge += [(xs.at(point.x), ys.at(point.high)) for point in reversed(banded) if point.high is not None]
        parts.append(tag("path", d=_path(edge) + "Z", class_="band"))
    if line.kind != "dots":
        parts.append(tag("path", d=_path(places), class_=line.kind))
    for index, ((x, y), point) in enumerate(zip(places, line.points, strict=True)):
        mark = _marker(line.style, x, y, "hollow" if line.hollow and index == 0 else "mark")
        if line.kind != "line":
            mark = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_="dot" if line.kind == "dots" else "hit")
        hit = tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=10 if line.kind == "line" else 5, class_="hit")
        parts.append(tag("g", tag("title", point.tip), mark, hit, class_="point"))
    return tag("g", *parts, class_=f"series {_hue(line.style)}", data_style=line.style)


def _hue(style: int) -> str:
    return "ref" if style < 0 else f"h{style % HUES}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _marker(style: int, x: float, y: float, kind: str) -> Markup:
    """One of six shapes; with eight hues, 24 styles differ in either."""
    shapes = (
        "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1-4 0Z",
        "M-3.8-3.8H3.8V3.8H-3.8Z",
        "M0-5L4.7 3.6H-4.7Z",
        "M0-5.2L4.6 0L0 5.2L-4.6 0Z",
        "M0 5L4.7-3.6H-4.7Z",
        "M-1.7-4.6H1.7V-1.7H4.6V1.7H1.7V4.6H-1.7V1.7H-4.6V-1.7H-1.7Z",
    )
    return tag("path", d=shapes[style % len(shapes)], transform=f"translate({x:.1f} {y:.1f})", class_=kind)


def _text(text: str, x: float, y: float, kind: str | None = None, *, anchor: str = "middle") -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=kind)
