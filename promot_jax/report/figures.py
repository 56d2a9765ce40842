"""The paper's curves as charts: ICL, format share and target score against step, and target score against ICL.

Figures 1 and 2 (`forgetting`, `format_share_tasks`), 3 and 7 (`gradient_alignment`), 5 and 6 (`tradeoff_metrics`) of
the paper, and the averages of all methods in one chart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from promot_jax import methods
from promot_jax.report import frontier, measures, tables
from promot_jax.report.svg import Chart, Line, Panel, Point
from promot_jax.results import bootstrap
from promot_jax.results.matched_target import model_tuning
from promot_jax.results.schema import Comparison, GradientAlignment, Run
from promot_jax.results.scores import StepEvaluation

Value = Callable[[StepEvaluation], float | None]
TARGET_SCORE, ICL_AVERAGE, FORMAT_SHARE = map(attrgetter, ("target", "icl", "format_share"))

REFERENCE, SHARE, ICL, TARGET = -1, 4, 5, 6  # where lines are scores rather than methods
MODEL_STEP = "Step (updates of the model)"
PROMPT_STEP = "Step of stage 1"


@dataclass(frozen=True)
class Series:
    """One method's curves: `values[seed][step]`, on [0, 100]."""

    method: str
    values: dict[int, dict[int, float]]

    def common(self) -> list[int]:
        """Steps that every seed has; a mean over changing seeds would show jumps that no run has."""
        return sorted(set.intersection(*(set(curve) for curve in self.values.values())))

    def spread(self, step: int) -> bootstrap.Spread:
        """Mean and range over seeds at a common step."""
        spread = bootstrap.across_seeds(curve[step] for curve in self.values.values())
        assert spread is not None  # a common step has a value for each seed
        return spread

    def ends(self) -> str:
        """`from 52.5 at step 0 to 22.1 at step 60 (mean of 3 seeds)`."""
        seeds = "1 seed" if len(self.values) == 1 else f"mean of {len(self.values)} seeds"
        steps = self.common()
        told = [f"{self.spread(step).mean:.1f} at step {step}" for step in (steps[0], steps[-1])] if steps else []
        return f"{'from ' + ' to '.join(told) if told else 'no common step'} ({seeds})"


def first(results: Comparison) -> list[Chart]:
    """Draws what a report shows first, the frontiers, of a comparison that has evaluations."""
    chart = frontier.chart(results, _style, f"Target score{_target_name(results)}", REFERENCE)
    return [] if chart is None else [chart]


def charts(results: Comparison) -> list[Chart]:
    """Draws every other figure for which a comparison has evaluations."""
    figures = (
        _tradeoff, _tradeoff_metrics, _forgetting, _icl, _ability, _format_share, _format_share_tasks, _target,
        _measures
    )  # fmt: skip
    drawn = (draw(results) for draw in figures)
    return [chart for chart in drawn if chart is not None]


def series(
    results: Comparison, value: Value, *, stages: Sequence[str] | None = None, mixtures: bool = False
) -> list[Series]:
    """Reads one number of each evaluation, per method that has it.

    Evaluations of `stages` count (None for those that tune the model), and with `mixtures` those of models between two
    (with an `alpha`), whose step is no number of updates.
    """
    counting = methods.model_tuning() if stages is None else stages
    found = []
    for method in tables.ordered(results.methods):
        values = {}
        for run in results.methods[method]:
            counted = [p for p in run.curve if p.stage in counting and (mixtures or p.alpha is None)]
            if points := {p.step: number for p in counted if (number := value(p)) is not None}:
                values[run.seed] = points
        if values:
            found.append(Series(method, values))
    return found


# ---- figures ---------------------------------------------------------------------------------------------------------


def _icl(results: Comparison) -> Chart | None:
    title, axis = "ICL normalised average against step", f"ICL normalised average{_shots(results)}"
    return _against_step("icl", title, axis, series(results, ICL_AVERAGE), results, start=True)


def _format_share(results: Comparison) -> Chart | None:
    curves = series(results, FORMAT_SHARE)
    return _against_step("format_share", "Format share against step", "Outputs in the label set (%)", curves, results)


def _target(results: Comparison) -> Chart | None:
    named = {point.stage for run in results.runs for point in run.curve}
    tuning = methods.model_tuning()
    stages = {PROMPT_STEP: sorted(named - {*tuning}), MODEL_STEP: tuning}
    curves = {axis: series(results, TARGET_SCORE, stages=names) for axis, names in stages.items()}
    curves = {axis: members for axis, members in curves.items() if members}
    panels = [Panel(axis, "Target score, validation", _lines(members, results)) for axis, members in curves.items()]
    told = [f"{axis}: {_described(members)}" for axis, members in curves.items()]
    return _chart("target", f"Target score{_target_name(results)} against step", told, panels)


def _forgetting(results: Comparison) -> Chart | None:
    """Figure 1: the target score rises while exact match on ICL tasks falls, a panel per method.

    The paper's tasks scored by exact match are question answering. Without such tasks the ICL average is drawn.
    """
    exact_match = partial(_of_metric, "exact_match")
    exact = any(exact_match(point) is not None for run in results.runs for point in run.curve)
    value: Value = exact_match if exact else ICL_AVERAGE
    name = "ICL tasks scored by exact match" if exact else "ICL normalised average"
    targets = {one.method: one for one in series(results, TARGET_SCORE)}
    panels, told = [], []
    for icl in series(results, value):
        if icl.method in targets:
            label = methods.label(icl.method)
            lines = [
                _line(targets[icl.method], TARGET, "target score (left axis)", label),
                _line(icl, ICL, f"{name} (right axis)", label, right=True),
            ]
            panels.append(Panel(MODEL_STEP, "Target score", tuple(lines), label, "ICL score"))
            told.append(f"{label}: target {targets[icl.method].ends()}, ICL {icl.ends()}.")
    return _chart("forgetting", f"Target score and {'exact match in context' if exact else 'ICL'}", told, panels)


def _of_metric(metric: str, point: StepEvaluation) -> float | None:
    """Mean score of the ICL tasks that have a metric."""
    scores = [task.score for task in point.tasks.values() if task.metric == metric and task.score is not None]
    return sum(scores) / len(scores) if scores else None


def _format_share_tasks(results: Comparison) -> Chart | None:
    """Figure 2: the format share of every ICL task, a panel per method."""
    names = dict.fromkeys(name for run in results.runs for point in run.curve for name in point.tasks)

    def share(name: str, point: StepEvaluation) -> float | None:
        return point.tasks[name].format_share if name in point.tasks else None

    panels, told = _per_method(results, {name: partial(share, name) for name in names}, "Outputs in the label set (%)")
    return _chart("format_share_tasks", "Format share of each ICL task", told, panels)


def _ability(results: Comparison) -> Chart | None:
    """Format against ability: ICL tasks with a label set by generation, and by the likelihoods of their labels.

    A model that has lost a task's format alone still finds its right label the likeliest.
    """
    fields = {"generation": "score", "likelihood (acc)": "acc", "likelihood per character (acc norm)": "acc_norm"}
    values = {name: partial(_of_label_sets, field) for name, field in fields.items()}
    panels, told = _per_method(results, values, f"ICL tasks with a label set{_shots(results)}", band=True)
    return _chart("ability", "Format against ability: answers by generation and by likelihood", told, panels)


def _of_label_sets(field: str, point: StepEvaluation) -> float | None:
    """Mean of a field of the scores of ICL tasks that were scored by likelihood too."""
    scored = [task for task in point.tasks.values() if None not in (task.score, task.acc, task.acc_norm)]
    return sum(getattr(task, field) for task in scored) / len(scored) if scored else None


def _per_method(
    results: Comparison, values: Mapping[str, Value], axis: str, *, band: bool = False
) -> tuple[list[Panel], list[str]]:
    """A panel per method with a line for each value that its evaluations have, and each panel in words."""
    lines: dict[str, list[Line]] = {}
    told: dict[str, list[str]] = {}
    for style, (name, value) in enumerate(values.items()):
        for one in series(results, value):
            lines.setdefault(one.method, []).append(_line(one, style, name, methods.label(one.method), band=band))
            told.setdefault(one.method, []).append(f"{name} {one.ends()}")
    panels = [Panel(MODEL_STEP, axis, tuple(of), methods.label(method)) for method, of in lines.items()]
    return panels, [f"{methods.label(method)}: {', '.join(parts)}." for method, parts in told.items()]


TRADEOFF_KEY = "Up and to the right is better. Hollow marks: before any update of the model. Dots: single seeds."


def _tradeoff(results: Comparison) -> Chart | None:
    """A point per checkpoint, mean over seeds; single seeds as dots."""
    lines, told = _tradeoff_lines(results, ICL_AVERAGE)
    x, y = f"Target score{_target_name(results)}, validation", f"ICL normalised average{_shots(results)}"
    alt = f"Scatter plot with paths. {told} {TRADEOFF_KEY}"
    title = "Trade-off: target score against ICL, one point per checkpoint"
    return Chart("tradeoff", title, alt, (Panel(x, y, lines),)) if lines else None


def _tradeoff_metrics(results: Comparison) -> Chart | None:
    """Figures 5 and 6: as `_tradeoff`, a panel for each metric of the ICL tasks, if they have several."""
    scores = [task for run in results.runs for point in run.curve for task in point.tasks.values()]
    x, panels, alt = f"Target score{_target_name(results)}, validation", [], ""
    for metric in dict.fromkeys(task.metric for task in scores if task.score is not None):
        lines, told = _tradeoff_lines(results, partial(_of_metric, metric))
        if lines:
            panels.append(Panel(x, f"Mean {metric}{_shots(results)}", lines, metric))
            alt += f"{metric}: {told} "
    title = "Trade-off by metric: target score against the mean of the ICL tasks with that metric"
    alt = f"Scatter plots with paths. {alt}{TRADEOFF_KEY}"
    return Chart("tradeoff_metrics", title, alt, tuple(panels)) if len(panels) > 1 else None


def _measures(results: Comparison) -> Chart | None:
    """ICL lost against the loss that training began with, and against how far the model has moved since."""
    panels, told = measures.panels(results, _style)
    title = "What is forgotten against what explains it, one point per run or checkpoint"
    return Chart("measures", title, f"Scatter plots. {told}", panels) if panels else None


def _tradeoff_lines(results: Comparison, value: Value) -> tuple[tuple[Line, ...], str]:
    """Each method's path from checkpoint to checkpoint in target score and `value`, and its ends in words."""
    targets = {one.method: one for one in series(results, TARGET_SCORE, mixtures=True)}
    lines: list[Line] = []
    told: list[str] = []
    for icl in series(results, value, mixtures=True):
        if icl.method not in targets:
            continue
        target, label, style = targets[icl.method], methods.label(icl.method), _style(icl.method, results)
        seeds = [seed for seed in target.values if seed in icl.values]
        steps = {seed: sorted(set(target.values[seed]) & set(icl.values[seed])) for seed in seeds}
        shared = sorted(set.intersection(*map(set, steps.values()))) if seeds else []
        if not shared:
            continue
        places = _places(results, icl.method)
        both = {(s, n): (target.values[s][n], icl.values[s][n]) for s in seeds for n in steps[s]}
        if len(seeds) > 1:
            dots = [Point(x, y, _pair(f"{label}, seed {s}", places[n], x, y)) for (s, n), (x, y) in both.items()]
            lines.append(Line("", style, tuple(dots), "dots"))
        means = [[sum(both[s, n][i] for s in seeds) / len(seeds) for n in shared] for i in (0, 1)]
        points = [Point(x, y, _pair(label, places[n], x, y)) for n, x, y in zip(shared, *means, strict=True)]
        lines.append(Line(label, style, tuple(points), hollow=shared[0] == 0))
        told.append(" to ".join(f"{points[end].tip.partition(': ')[2]} at {places[shared[end]]}" for end in (0, -1)))
        told[-1] = f"{label} from {told[-1]}."
    return tuple(lines), " ".join(told)


def gradient_alignment(alignment: GradientAlignment) -> list[Chart]:
    """Figures 3 and 7: cosine between the gradients of real and shuffled targets, a chart with and without the prompt.

    `alignment` is the result of `analysis.gradient_alignment.along`.
    """
    drawn = []
    prompts = list(dict.fromkeys(point.prompt for point in alignment.points))
    for prompt in prompts:
        known = [p for p in alignment.points if p.prompt == prompt and p.mean is not None]
        panels, told = [], []
        for scope in dict.fromkeys(point.scope for point in known):
            lines = []
            for style, group in enumerate(dict.fromkeys(point.group for point in known)):
                members = [p for p in known if (p.scope, p.group) == (scope, group)]
                points = [
                    Point(
                        p.step,
                        p.mean or 0.0,
                        f"{group}, {scope}, step {p.step}: {p.mean:.3f} [{p.low:.3f}, {p.high:.3f}]",
                        *((p.low, p.high) if group == "all" else ()),  # five bands would cover each other
                    )
                    for p in sorted(members, key=lambda p: p.step)
                ]
                if points:
                    lines.append(Line(group, style, tuple(points)))
                    told.append(f"{group} from {points[0].y:.2f} to {points[-1].y:.2f} ({scope})")
            panels.append(Panel("Step", "Cosine", tuple(lines), scope))
        attached = f"with its soft prompt {prompt!r}" if prompt else "without a prompt"
        of = f"{alignment.stage} on {alignment.task}, seed {alignment.seed}"
        title = f"Gradient alignment with shuffled targets: {of}, {attached}"
        alt = f"Line charts. {', '.join(told)}. Band, of all: range over {alignment.batches} batches."
        name = "gradient_alignment" + ("" if prompt == prompts[0] else "_stripped")
        if panels:
            drawn.append(Chart(name, title, alt, tuple(panels)))
    return drawn


def of_run(run: Run) -> Chart | None:
    """Draws the curves of one run: target score, ICL and format share, a panel per stage."""
    panels, told = [], []
    values: list[tuple[Value, str, int]] = [
        (TARGET_SCORE, "target score", TARGET),
        (ICL_AVERAGE, "ICL", ICL),
        (FORMAT_SHARE, "format share (%)", SHARE),
    ]
    for stage in dict.fromkeys(point.stage for point in run.curve):
        curve = [point for point in run.curve if point.stage == stage]
        lines = []
        for value, name, style in values:
            points = [
                Point(point.step, number, f"{name}, {tables.place(point.step, point.alpha)}: {number:.1f}")
                for point in curve
                if (number := value(point)) is not None
            ]
            if points:
                lines.append(Line(name, style, tuple(points)))
                told.append(f"{stage}: {name} from {points[0].y:.1f} to {points[-1].y:.1f}.")
        if lines:
            mixtures = any(point.alpha is not None for point in curve)
            panels.append(Panel("Alpha (%)" if mixtures else "Step", "0 to 100", tuple(lines), stage))
    return _chart("curves", "Curves", told, panels)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _chart(name: str, title: str, told: Sequence[str], panels: Sequence[Panel]) -> Chart | None:
    return Chart(name, title, f"Line charts. {' '.join(told)}", tuple(panels)) if panels else None


def _against_step(
    name: str, title: str, axis: str, curves: Sequence[Series], results: Comparison, *, start: bool = False
) -> Chart | None:
    if not curves:
        return None
    lines = list(_lines(curves, results))
    first = [curve[0] for one in curves for curve in one.values.values() if 0 in curve]
    if start and first:
        # Step 0 without a prompt is the pretrained model, evaluated on the examples of the curve.
        level = sum(first) / len(first)
        ends = (min(p.x for line in lines for p in line.points), max(p.x for line in lines for p in line.points))
        points = tuple(Point(x, level, f"pretrained: {level:.1f}") for x in ends)
        lines.insert(0, Line(methods.label(methods.REFERENCE), REFERENCE, points, "ruled"))
    return _chart(name, title, [_described(curves)], [Panel(MODEL_STEP, axis, tuple(lines))])


def _lines(curves: Sequence[Series], results: Comparison) -> tuple[Line, ...]:
    lines: list[Line] = []
    for one in curves:
        style, label, steps = _style(one.method, results), methods.label(one.method), one.common()
        for seed, curve in one.values.items():
            if set(curve) != set(steps):  # a seed that is further than the others
                points = (Point(n, curve[n], f"{label}, seed {seed}, step {n}: {curve[n]:.1f}") for n in sorted(curve))
                lines.append(Line("", style, tuple(points), "thin"))
        lines.append(_line(one, style, label, label))
    return tuple(lines)


def _line(one: Series, style: int, label: str, method: str, *, right: bool = False, band: bool = True) -> Line:
    """Draws the mean over seeds, with their range as text and, if `band`, as a band."""
    what = method if method == label else f"{method}, {label}"
    points = []
    for step in one.common():
        mean, low, high, seeds = one.spread(step)
        told = f"{what}, step {step}: {mean:.1f}"
        edges = (low, high) if seeds > 1 and band else (None, None)
        points.append(Point(step, mean, told + (f" [{low:.1f}, {high:.1f}]" if seeds > 1 else ""), *edges))
    return Line(label, style, tuple(points), right=right)


def _pair(label: str, place: str, target: float, icl: float) -> str:
    return f"{label}, {place}: target {target:.1f}, ICL {icl:.1f}"


def _places(results: Comparison, method: str) -> dict[int, str]:
    """Names of the steps of a method's model tuning."""
    points = [point for run in results.methods[method] for point in model_tuning(run.curve)]
    return {point.step: tables.place(point.step, point.alpha) for point in points}


def _style(method: str, results: Comparison) -> int:
    """A style of its own for every method of a comparison, the same in all of its figures."""
    styles = {name: found.style for name, found in methods.METHODS.items() if found.style is not None}
    if method in styles:
        return styles[method]
    others = [name for name in results.methods if name not in styles and name != methods.REFERENCE]
    return len(styles) + others.index(method) if method in others else REFERENCE


def _described(curves: Iterable[Series]) -> str:
    return " ".join(f"{methods.label(one.method)} {one.ends()}." for one in curves)


def _target_name(results: Comparison) -> str:
    names = {run.target.task for run in results.runs if run.target}
    return f" ({names.pop()})" if len(names) == 1 else ""


def _shots(results: Comparison) -> str:
    """The number of shots of the curves' evaluations, if the settings name it."""
    shots = {run.settings.get("curve_shots") for run in results.runs} - {None}
    return f" ({shots.pop()}-shot)" if len(shots) == 1 else ""
