"""The frontier of every method as the report's first figure, and its area as a table (`results.frontier`)."""

from collections.abc import Callable, Sequence

from promot_jax import methods
from promot_jax.report.svg import Chart, Line, Panel, Point
from promot_jax.report.tables import ABSENT, place, signed, varied
from promot_jax.results import frontier
from promot_jax.results.frontier import Chosen, Frontier
from promot_jax.results.schema import Comparison
from promot_jax.results.scores import Interval

TITLE = "Frontier: the ICL that each method keeps at each target score"
KEY = (
    "Up and to the right is better. Validation split: every setting and checkpoint, mean over seeds; the line joins "
    "those that no other of the method exceeds in both scores, dots are the others. Test split: the checkpoints that "
    "were chosen on the validation split. Bars: 95 % bootstrap intervals."
)
READING = (
    "Validation split, over all settings, checkpoints and alphas that were tried, mean over seeds, without step 0. The "
    "area is the share of the rectangle from the reference to (100, 100) that lies below and to the left of some "
    "point: 100 % keeps all ICL at any target score. In brackets the 95 % bootstrap interval, over what the last "
    "column says, around the estimate. More settings and checkpoints can only enlarge an area: compare methods with "
    "equally many."
)
_Style = Callable[[str, Comparison], int]


def chart(results: Comparison, style: _Style, x: str, reference: int) -> Chart | None:
    """Draws the frontiers on the validation split and the chosen checkpoints on the test split.

    Args:
        results: of a comparison.
        style: of a method in its figures.
        x: name of the axis of target scores.
        reference: style of the pretrained model.
    """
    found = frontier.frontiers(results)
    if not found:
        return None
    start = [Line(methods.label(methods.REFERENCE), reference, points, "marks") for points in _start(results)]
    validation = [line for one in found for line in _lines(one, style(one.method, results))]
    panels = [Panel(x, "ICL normalised average", (*start, *validation), "Validation split: all checkpoints")]
    shots = _shots(results)
    chosen = frontier.chosen(results, shots) if shots else []
    test = [
        Line(methods.label(one.method), style(one.method, results), (_chosen_point(one),), "marks") for one in chosen
    ]
    if test:
        panels.append(Panel(x, "ICL normalised average", tuple(test), f"Test split: chosen checkpoints, {shots}-shot"))
    told = [f"{methods.label(one.method)}: area {_area(one)}, {_counts(one)} on the frontier." for one in found]
    told += [line.points[0].tip + "." for line in test]
    return Chart("frontier", TITLE, f"Scatter plots. {' '.join(told)}", tuple(panels), KEY)


def rows(results: Comparison) -> tuple[list[list[str]], str]:
    """The areas as a table of text, the header first, and how it is read."""
    least, _ = frontier.reference(results)
    header = ["method", "area (%)", "minus fine-tuning", "points on the frontier", "seeds", "interval over"]
    found = frontier.frontiers(results)
    table = []
    for one in found:
        change = ABSENT if one.change is None else f"{signed(one.change)}{_interval(one.change_ci95, signed)}"
        shown = [_area(one), change, _counts(one), str(one.seeds), one.over or "none: no scores of examples"]
        table.append([methods.label(one.method), *shown])
    reading = f"{READING} Reference: target score {least:.1f}, ICL 0."
    if left_out := sum(one.left_out for one in found):
        reading += f" Left out, as not every seed has them: {left_out} points."
    return [header, *table], reading


def _lines(one: Frontier, style: int) -> list[Line]:
    """The frontier of a method, and its other points as dots."""
    label = methods.label(one.method)
    points = [
        (Point(p.target, p.icl, _tip(label, _setting(p), p), *(p.icl_ci95 or (None, None)), *_ends(p)), p.on_frontier)
        for p in reversed(one.points)  # by target score, rising
    ]
    dots = tuple(Point(point.x, point.y, point.tip) for point, kept in points if not kept)
    front = tuple(point for point, kept in points if kept)
    return [*([Line("", style, dots, "dots")] if dots else []), Line(label, style, front, "stairs")]


def _start(results: Comparison) -> list[tuple[Point, ...]]:
    """The pretrained model on the validation split, where it is known."""
    target, icl = frontier.reference(results)
    if icl is None:
        return []
    return [(Point(target, icl, f"{methods.label(methods.REFERENCE)}: target {target:.1f}, ICL {icl:.1f}"),)]


def _chosen_point(one: Chosen) -> Point:
    tip = _tip(methods.label(one.method), "test split" + (f", mean of {one.seeds} seeds" if one.seeds > 1 else ""), one)
    return Point(one.target, one.icl, tip, *(one.icl_ci95 or (None, None)), *_ends(one))


def _ends(one: frontier.Point | Chosen) -> Sequence[float | None]:
    return one.target_ci95 or (None, None)


def _setting(point: frontier.Point) -> str:
    """`learning_rate 0.001, step 60`."""
    return ", ".join(filter(None, [varied(point.varied), place(point.step, point.alpha)]))


def _tip(label: str, where: str, one: frontier.Point | Chosen) -> str:
    target, icl = _interval(one.target_ci95), _interval(one.icl_ci95)
    return f"{label}, {where}: target {one.target:.1f}{target}, ICL {one.icl:.1f}{icl}"


def _interval(ci95: Interval | None, form: Callable[[float], str] = "{:.1f}".format) -> str:
    return "" if ci95 is None else f" [{form(ci95[0])}, {form(ci95[1])}]"


def _area(one: Frontier) -> str:
    return f"{one.area:.1f}{_interval(one.ci95)}"


def _counts(one: Frontier) -> str:
    return f"{sum(point.on_frontier for point in one.points)} of {len(one.points)}"


def _shots(results: Comparison) -> str:
    """The number of shots of the curves, where the final evaluations have it; otherwise their smallest."""
    curves = {str(run.settings.get("curve_shots")) for run in results.runs}
    known = sorted({shots for run in results.runs for shots in run.icl}, key=int)
    return next((shots for shots in known if shots in curves), known[0] if known else "")
