"""The figure of ICL lost against measures that may explain it: the first loss, and KL to the base model."""

from collections.abc import Callable
from operator import attrgetter

from promot_jax import methods
from promot_jax.report.svg import Line, Panel, Point
from promot_jax.report.tables import varied
from promot_jax.results.frontier import by_setting
from promot_jax.results.matched_target import model_tuning
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import StepEvaluation

Value = Callable[[StepEvaluation], float | None]
INITIAL_LOSS: Value = attrgetter("initial_loss")  # of the evaluation at step 0 alone
_MEASURES: dict[str, Value] = {
    "Training loss before the first update (nats per token)": INITIAL_LOSS,
    "KL(base || tuned) on the fine-tuned task (nats per token)": attrgetter("kl_target"),
    "KL(base || tuned) on ICL tasks (nats per token)": attrgetter("kl_icl"),
}
LOST = "ICL lost since step 0"


def panels(results: Comparison, style: Callable[[str, Comparison], int]) -> tuple[tuple[Panel, ...], str]:
    """A panel for each measure that the evaluations have, and its points in words.

    The training loss has one point per run, at its last checkpoint; the divergences have one per checkpoint. All
    settings that were tried are there.

    Args:
        results: of a comparison.
        style: of a method in its figures.
    """
    drawn, descriptions = [], []
    for axis, measure in _MEASURES.items():
        lines = []
        for method in results.methods:
            runs = by_setting(results, method)
            points = tuple(point for settings, run in runs for point in _points(run, varied(settings), measure))
            if points:
                lines.append(Line(methods.label(method), style(method, results), points, "dots"))
        if lines:
            drawn.append(Panel(axis, LOST, tuple(lines)))
            count = sum(len(line.points) for line in lines)
            descriptions.append(f"{axis}: {count} points, rank correlation with ICL lost {_rank_correlation(lines)}.")
    return tuple(drawn), " ".join(descriptions)


def _points(run: Run, setting: str, measure: Value) -> list[Point]:
    curve = [point for point in model_tuning(run.curve) if point.alpha is None and point.icl is not None]
    if not curve or curve[0].step != 0:
        return []
    start, *later = curve
    found = []
    for point in later[-1:] if measure is INITIAL_LOSS else later:
        value = measure(start if measure is INITIAL_LOSS else point)
        if value is not None and point.icl is not None and start.icl is not None:
            lost = start.icl - point.icl
            where = ", ".join(filter(None, [methods.label(run.method), setting, f"seed {run.seed}, step {point.step}"]))
            found.append(Point(value, lost, f"{where}: {value:.3f}, {lost:.1f} lost"))
    return found


def _rank_correlation(lines: list[Line]) -> str:
    """Spearman's, over all points; "unknown" where either side does not vary."""
    from scipy.stats import spearmanr  # half a second, which other figures need not wait

    x, y = zip(*((point.x, point.y) for line in lines for point in line.points), strict=True)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return "unknown"
    return f"{spearmanr(x, y).statistic:.2f}"
