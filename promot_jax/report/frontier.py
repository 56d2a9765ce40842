"""The frontier of every method as the report's first figure, and its area as a table (`results.frontier`)."""

from collections.abc import Callable

from promot_jax import methods
from promot_jax.report.svg import Chart, Line, Panel, Point
from promot_jax.report.tables import ABSENT, place, signed, varied
from promot_jax.results import frontier
from promot_jax.results.frontier import Area, Frontier, Scores
from promot_jax.results.schema import Comparison
from promot_jax.results.scores import Interval

TITLE = "Frontier: the ICL that each method keeps at each target score"
KEY = (
    "Up and to the right is better. Validation split: every setting and checkpoint, mean over seeds; the line joins "
    "those that no other of the method exceeds in both scores, dots are the others. Test split: checkpoints that were "
    "chosen on the validation split. Bars: 95 % bootstrap intervals."
)
READING = (
    "Over all settings, checkpoints and alphas that were tried, mean over seeds, without step 0. The area is the share "
    "of the rectangle from the reference to (100, 100) that lies below and to the left of some point: 100 % keeps all "
    "ICL at any target score. Test: area of the points that are the frontier on the validation split. Points: how many "
    "are the frontier, of all. In brackets the 95 % bootstrap interval, over what the last column says, around the "
    "estimate. More settings and checkpoints can only enlarge an area of the validation split: compare methods with "
    "equally many."
)
AXIS = "ICL normalised average"


def chart(results: Comparison, style: Callable[[str, Comparison], int], x: str, reference: int) -> Chart | None:
    """Draws the frontiers on the validation split, the same points on the test split, and the chosen checkpoints there.

    Args:
        results: of a comparison.
        style: of a method in its figures.
        x: name of the axis of target scores.
        reference: style of the pretrained model.
    """
    found = frontier.frontiers(results)
    if not found:
        return None
    shots = curve_shots(results)
    chosen = frontier.chosen(results, shots) if shots else []
    validation = [line for one in found for line in _validation(one, style(one.method, results))]
    start = [Line(methods.label(methods.REFERENCE), reference, (point,), "marks") for point in _start(results)]
    tested = [line for one in found for line in _test(one, style(one.method, results))]
    final = [
        Line(
            methods.label(one.method),
            style(one.method, results),
            (_point(methods.label(one.method), f"test split, {_seeds(one.seeds)}", one.scores),),
            "marks",
        )
        for one in chosen
    ]
    panels = {
        "Validation split: all checkpoints": [*start, *validation],
        f"Test split: the checkpoints on those lines, {shots}-shot": tested,
        f"Test split: the best checkpoints, {shots}-shot": final,
    }
    drawn = tuple(Panel(x, AXIS, tuple(lines), title) for title, lines in panels.items() if lines)
    told = [
        f"{methods.label(one.method)}: area {_area(one.validation)}, {_counts(one)} on the frontier." for one in found
    ]
    told += [line.points[0].tip + "." for line in final]
    return Chart("frontier", TITLE, f"Scatter plots. {' '.join(told)}", drawn, KEY)


def rows(results: Comparison) -> tuple[list[list[str]], str]:
    """The areas as a table of text, the header first, and how it is read."""
    found = frontier.frontiers(results)
    on_test = any(one.test for one in found)
    header = ["method", "validation (%)", "minus fine-tuning"]
    header += ["test (%)", "minus fine-tuning"] if on_test else []
    table = [[*header, "points", "seeds", "interval over"]]
    for one in found:
        areas = [_area(one.validation), _change(one.validation)]
        areas += [_area(one.test), _change(one.test)] if on_test else []
        over = one.validation.over or "none: no scores of examples"
        table.append([methods.label(one.method), *areas, _counts(one), str(one.seeds), over])
    reading = f"{READING} Reference: ICL 0, target score {frontier.reference(results)[0]:.1f} (validation split)"
    reading += f", {frontier.reference_on_test(results):.1f} (test split)." if on_test else "."
    if left_out := sum(one.left_out for one in found):
        reading += f" Left out, as not every seed has them: {left_out} points."
    return table, reading


def _validation(one: Frontier, style: int) -> list[Line]:
    """The frontier of a method, and its other points as dots."""
    label = methods.label(one.method)
    rising = one.points[::-1]
    front = tuple(_point(label, _setting(p), p.validation) for p in rising if p.on_frontier)
    others = [_point(label, _setting(p), p.validation) for p in rising if not p.on_frontier]
    dots = tuple(Point(point.x, point.y, point.tip) for point in others)  # their bars would hide the lines
    return [*([Line("", style, dots, "dots")] if dots else []), Line(label, style, front, "stairs")]


def _test(one: Frontier, style: int) -> list[Line]:
    """The test scores of a method's frontier."""
    label = methods.label(one.method)
    points = tuple(_point(label, f"{_setting(p)}, test split", p.test) for p in one.points[::-1] if p.test)
    return [Line(label, style, points, "marks")] if points else []


def _start(results: Comparison) -> list[Point]:
    """The pretrained model on the validation split, where it is known."""
    target, icl = frontier.reference(results)
    if icl is None:
        return []
    return [_point(methods.label(methods.REFERENCE), "step 0", Scores(target, icl, None, None))]


def _point(label: str, where: str, scores: Scores) -> Point:
    target, icl = interval(scores.target_ci95), interval(scores.icl_ci95)
    tip = f"{label}, {where}: target {scores.target:.1f}{target}, ICL {scores.icl:.1f}{icl}"
    return Point(scores.target, scores.icl, tip, *(scores.icl_ci95 or (None, None)), *(scores.target_ci95 or ()))


def _setting(point: frontier.Point) -> str:
    """`learning_rate 0.001, step 60`."""
    return ", ".join(filter(None, [varied(point.varied), place(point.step, point.alpha)]))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"mean of {count} seeds"


def interval(ci95: Interval | None, form: Callable[[float], str] = "{:.1f}".format) -> str:
    """` [57.8, 65.2]`, or "" for none."""
    return "" if ci95 is None else f" [{form(ci95[0])}, {form(ci95[1])}]"


def _area(area: Area | None) -> str:
    return ABSENT if area is None else f"{area.percent:.1f}{interval(area.ci95)}"


def _change(area: Area | None) -> str:
    if area is None or area.change is None:
        return ABSENT
    return f"{signed(area.change)}{interval(area.change_ci95, signed)}"


def _counts(one: Frontier) -> str:
    return f"{sum(point.on_frontier for point in one.points)} of {len(one.points)}"


def curve_shots(results: Comparison) -> str:
    """The number of shots of the curves, where the final evaluations have it; otherwise their smallest."""
    curves = {str(run.settings.get("curve_shots")) for run in results.runs}
    known = sorted({shots for run in results.runs for shots in run.icl}, key=int)
    return next((shots for shots in known if shots in curves), known[0] if known else "")
