"""The paper's figures: what each draws of which runs."""

from statistics import mean as average

import pytest
from random_results import alignment, random_results

from promot_jax.report import figures
from promot_jax.results.records import replace
from promot_jax.results.schema import Comparison
from promot_jax.results.scores import Score


def without_tasks(tasks):
    """Random results whose curves have other tasks."""
    data = random_results()
    return Comparison(
        methods={
            method: [replace(run, curve=[replace(point, tasks=tasks) for point in run.curve]) for run in runs]
            for method, runs in data.methods.items()
        }
    )


def drawn(data, name):
    (chart,) = (one for one in figures.charts(data) if one.name == name)
    return chart


def panel(chart, label):
    (found,) = (one for one in chart.panels if one.title == label)
    return {line.label: line for line in found.lines}


def values(line):
    return {point.x: point.y for point in line.points}


def mean(data, method, value):
    """By step, of the curves of the model's tuning, over seeds."""
    by_step = {}
    for run in data.methods[method]:
        for point in run.curve:
            if point.stage in ("finetune", "stage2"):
                by_step.setdefault(point.step, []).append(value(point))
    return {step: pytest.approx(sum(found) / len(found)) for step, found in by_step.items()}


@pytest.mark.parametrize(("method", "label"), [("finetune", "fine-tuning"), ("promot", "ProMoT")])
def test_figure_1_target_score_and_exact_match(method, label):
    data = random_results()
    chart = drawn(data, "forgetting")
    assert chart.title == "Target score and exact match in context" and len(chart.panels) == 2
    target, icl = panel(chart, label).values()
    assert values(target) == mean(data, method, lambda point: point.target)
    exact = ("capital", "past_tense")  # the others have another metric
    assert values(icl) == mean(data, method, lambda p: sum(p.tasks[name].score for name in exact) / 2)
    assert (target.right, icl.right) == (False, True) and len(values(icl)) == 7


def test_figures_5_and_6_a_panel_per_metric():
    """The paper: on y, figure 5 has mean accuracy on classification tasks, figure 6 mean BLEU on translation."""
    data = random_results()
    chart, plain = drawn(data, "tradeoff_metrics"), drawn(data, "tradeoff")
    metrics = {task.metric for run in data.runs for point in run.curve for task in point.tasks.values()}
    assert {one.title for one in chart.panels} == metrics and len(metrics) > 1
    for metric in metrics:
        line = panel(chart, metric)["ProMoT"]
        own = mean(data, "promot", lambda p, m=metric: average(t.score for t in p.tasks.values() if t.metric == m))
        assert [point.y for point in line.points] == [own[step] for step in sorted(own)]
        (reference,) = (one for one in plain.panels[0].lines if one.label == "ProMoT")
        assert [point.x for point in line.points] == [point.x for point in reference.points]
    one_metric = without_tasks({name: Score(metric="bleu", score=1.0, n=1) for name in ("en", "fr")})
    assert "tradeoff_metrics" not in [one.name for one in figures.charts(one_metric)]


def test_figure_1_of_tasks_without_exact_match():
    data = without_tasks({"negation": Score(metric="rouge2", score=1.0, n=1)})
    chart = drawn(data, "forgetting")
    assert chart.title == "Target score and ICL"
    assert values(list(panel(chart, "ProMoT").values())[1]) == mean(data, "promot", lambda point: point.icl)


def test_figure_2_format_share_of_each_task():
    data = random_results()
    chart = drawn(data, "format_share_tasks")
    assert [one.title for one in chart.panels] == ["fine-tuning", "ProMoT"]
    for name in ("capital", "past_tense", "negation", "reading_qa"):
        found = values(panel(chart, "ProMoT")[name])
        assert found == mean(data, "promot", lambda point, name=name: point.tasks[name].format_share)
    assert "format_share_tasks" not in [one.name for one in figures.charts(without_tasks({}))]


def test_figures_3_and_7_gradient_alignment():
    found = alignment()
    charts = figures.gradient_alignment(found)
    assert [chart.name for chart in charts] == ["gradient_alignment", "gradient_alignment_stripped"]
    for chart, prompt in zip(charts, dict.fromkeys(point.prompt for point in found.points), strict=True):
        shown = {(p.title, line.label, x): y for p in chart.panels for line in p.lines for x, y in values(line).items()}
        of_prompt = [point for point in found.points if point.prompt == prompt and point.mean is not None]
        assert shown == {(p.scope, p.group, p.step): p.mean for p in of_prompt} and shown


def test_figures_5_and_6_a_point_per_checkpoint():
    data = random_results()
    (plot,) = drawn(data, "tradeoff").panels
    lines = {line.label: line for line in plot.lines if line.label}
    target, icl = (mean(data, "promot", lambda point, key=key: getattr(point, key)) for key in ("target", "icl"))
    assert [(p.x, p.y) for p in lines["ProMoT"].points] == [(target[step], icl[step]) for step in range(0, 61, 10)]
    assert sum(len(line.points) for line in plot.lines if line.kind == "dots") == 2 * 2 * 7  # methods, seeds, steps


def test_what_is_forgotten_against_what_explains_it():
    """A point per run for the loss before the first update, a point per later checkpoint for a divergence."""
    data = random_results()

    def measured(run):
        if run.method == "pretrained":
            return run
        base = 2.0 if run.method == "finetune" else 0.5
        loss = {0: base + run.seed}
        curve = [
            replace(point, initial_loss=loss.get(point.step), kl_target=point.step / 100)
            if point.stage in ("finetune", "stage2")
            else point
            for point in run.curve
        ]
        return replace(run, curve=curve)

    assert "measures" not in [one.name for one in figures.charts(data)]
    data = Comparison(methods={method: list(map(measured, runs)) for method, runs in data.methods.items()})
    chart = drawn(data, "measures")

    loss, divergence = chart.panels
    for method, label, base in (("finetune", "fine-tuning", 2.0), ("promot", "ProMoT", 0.5)):
        curves = [
            [point for point in run.curve if point.stage in ("finetune", "stage2")] for run in data.methods[method]
        ]
        (line,) = (one for one in loss.lines if one.label == label)
        assert [point.x for point in line.points] == [base + run.seed for run in data.methods[method]]
        assert [point.y for point in line.points] == [curve[0].icl - curve[-1].icl for curve in curves]
        (line,) = (one for one in divergence.lines if one.label == label)
        wanted = [(point.step / 100, curve[0].icl - point.icl) for curve in curves for point in curve[1:]]
        assert [(point.x, point.y) for point in line.points] == wanted
    assert "rank correlation" in chart.alt
    # All settings that were tried, not the chosen ones alone.
    (other, *_) = data.methods["finetune"]
    wider = drawn(replace(data, others=[replace(other, varied={"learning_rate": 0.1})]), "measures")
    (line,) = (one for one in wider.panels[0].lines if one.label == "fine-tuning")
    assert len(line.points) == len(data.methods["finetune"]) + 1
    assert line.points[-1].tip.startswith("fine-tuning, learning_rate 0.1, seed 0, step ")


def test_format_against_ability_where_labels_were_scored_by_likelihood():
    """A line each for generation and both likelihoods: means over the ICL tasks with a label set, and over seeds."""
    data = random_results()
    assert "ability" not in [one.name for one in figures.charts(data)]

    def measured(point):
        tasks = {name: replace(task, acc=task.score / 2, acc_norm=task.score / 4) for name, task in point.tasks.items()}
        return replace(point, tasks={**tasks, "reading_qa": point.tasks["reading_qa"]} if tasks else {})

    runs = {
        method: [replace(run, curve=[*map(measured, run.curve)]) for run in of] for method, of in data.methods.items()
    }
    chart = drawn(Comparison(methods=runs), "ability")
    assert [one.title for one in chart.panels] == ["fine-tuning", "ProMoT"]
    lines = [values(line) for line in panel(chart, "ProMoT").values()]
    names = ("capital", "past_tense", "negation")  # reading_qa has no label set
    for line, part in zip(lines, (1, 2, 4), strict=True):
        assert line == mean(data, "promot", lambda p, part=part: average(p.tasks[n].score for n in names) / part)
    assert all(point.low is not None for line in panel(chart, "ProMoT").values() for point in line.points)
