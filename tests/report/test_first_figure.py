"""The frontier and the paired differences in reports."""

import html
import re
from pathlib import Path

import pytest
from random_results import random_results, random_run

from promot_jax.report import blocks, figures, markdown, terminal
from promot_jax.report.svg import Chart, Line
from promot_jax.results import frontier
from promot_jax.results.records import replace
from promot_jax.results.schema import Candidate, Comparison, Run, Selection
from promot_jax.results.scores import Tested


def swept(seeds: int = 2) -> Comparison:
    """Random runs at two learning rates of each method."""
    data = random_results(seeds)
    methods = ("finetune", "promot")
    others = [replace(random_run(method, seed), varied={"learning_rate": 0.1}) for method in methods for seed in (7, 8)]
    others = [replace(run, seed=run.seed - 7) for run in others]
    chosen = Selection(chosen={"learning_rate": 0.5}, candidates=[Candidate(varied={}, seeds={})])
    return replace(data, others=others if seeds == 2 else [], selection=dict.fromkeys(methods, chosen))


def lines(chart: Chart, panel: int) -> dict[str, Line]:
    return {line.label or f"dots {line.style}": line for line in chart.panels[panel].lines}


def test_the_figure_has_every_setting_and_checkpoint_and_their_intervals() -> None:
    data = swept()
    (chart,) = figures.first(data)
    found = {one.method: one for one in frontier.frontiers(data)}
    drawn = lines(chart, 0)
    assert list(drawn) == ["pretrained", "dots 0", "fine-tuning", "dots 1", "ProMoT"]
    for name, label, dots in (("finetune", "fine-tuning", "dots 0"), ("promot", "ProMoT", "dots 1")):
        points = found[name].points
        assert len(points) == 2 * 6  # two rates, six checkpoints after step 0
        front = [(p.validation.target, p.validation.icl) for p in points if p.on_frontier]
        assert [(p.x, p.y) for p in drawn[label].points] == front[::-1] and drawn[label].kind == "stairs"
        others = [(p.validation.target, p.validation.icl) for p in points if not p.on_frontier]
        assert [(p.x, p.y) for p in drawn[dots].points] == others[::-1] and drawn[dots].kind == "dots"
        for point in drawn[label].points:
            assert None not in (point.low, point.high, point.left, point.right)
    tips = [point.tip for line in drawn.values() for point in line.points]
    assert sum("learning_rate 0.1, step 60: target " in tip for tip in tips) == 2
    assert all(re.search(r": target \d+\.\d.*, ICL \d+\.\d", tip) for tip in tips)
    assert [tip for tip in tips if "step 0:" in tip] == [drawn["pretrained"].points[0].tip]


def test_the_chosen_checkpoints_are_shown_by_their_test_scores() -> None:
    data = swept()
    (chart,) = figures.first(data)
    assert chart.panels[1].title == "Test split: the best checkpoints, 1-shot"
    for method, label in (("pretrained", "pretrained"), ("finetune", "fine-tuning"), ("promot", "ProMoT")):
        (point,) = lines(chart, 1)[label].points
        runs = data.methods[method]
        assert point.x == pytest.approx(sum(run.target.score for run in runs if run.target) / len(runs))
        assert point.y == pytest.approx(sum(run.icl["1"].norm_avg or 0 for run in runs) / len(runs))
        assert point.low is not None and point.high and point.low < point.y < point.high
        assert "test split, mean of 2 seeds: target" in point.tip


def test_one_run_of_before_has_its_intervals_over_examples() -> None:
    data = random_results(1)
    older = {
        method: [
            replace(r, example_scores={}, curve=[replace(p, example_scores={}) for p in r.curve]) for r in runs
        ]
        for method, runs in data.methods.items()
    }  # fmt: skip
    data = Comparison(methods=older)
    (chart,) = figures.first(data)
    (run,) = data.methods["promot"]
    (point,) = lines(chart, 1)["ProMoT"].points
    assert run.target and (point.left, point.right) == run.target.ci95 and (point.low, point.high) == (30.0, 50.0)
    assert lines(chart, 0)["ProMoT"].points[0].low is None
    (area,) = blocks.leading(data)
    assert area.rows[1][0] == "fine-tuning" and area.rows[1][-1] == "none: no scores of examples"


def test_no_curve_no_frontier() -> None:
    data = random_results(methods=("pretrained",))
    assert figures.first(data) == [] and blocks.leading(data) == []


def test_paired_differences_are_a_table() -> None:
    paired, area = blocks.leading(swept())
    assert paired.rows[0] == ["difference", "target", "Norm. Avg., 1-shot", "Norm. Avg., 4-shot", "seeds", "examples"]
    assert [row[0] for row in paired.rows[1:]] == [
        "ProMoT - fine-tuning",
        "pretrained - fine-tuning",
        "ProMoT - pretrained",
    ]
    for row in paired.rows[1:]:
        assert row[4:] == ["2", "50 target, 200 ICL"]
        for cell in row[1:4]:
            mean, star, low, high = re.fullmatch(r"(\S+?)(\*?) \[(\S+), (\S+)\]", cell).groups()  # type: ignore[union-attr]
            assert float(low) <= float(mean) <= float(high)
            assert not star or float(low) >= 0 or float(high) <= 0
    assert [row[0] for row in area.rows] == ["method", "fine-tuning", "ProMoT"]
    assert area.rows[1][-1] == "seeds and examples" and "Reference: ICL 0, target score" in area.reading
    tasks = blocks.further(swept())[-1]
    assert [row[1] for row in tasks.rows[1:5]] == ["capital", "negation", "past_tense", "reading_qa"]


def test_every_checkpoint_of_the_test_split_is_a_row(tmp_path: Path) -> None:
    """Means over seeds of `StepEvaluation.test`, and the pretrained model's final evaluation."""
    assert blocks.wide(swept()) == []  # none was scored there

    def tested(run: Run) -> Run:
        point = run.curve[-1]
        scored = {name: replace(score, acc=80.0) for name, score in run.icl["1"].tasks.items()}
        icl = {"1": replace(run.icl["1"], norm_avg=40.0 + run.seed, tasks=scored)}
        return replace(run, curve=[*run.curve[:-1], replace(point, test=Tested(target=run.target, icl=icl))])

    data = swept()
    methods = {name: runs if name == "pretrained" else [*map(tested, runs)] for name, runs in data.methods.items()}
    (table,) = blocks.wide(replace(data, methods=methods))
    tasks = list(data.runs[0].icl["1"].tasks)
    assert table.rows[0] == [
        "method", "setting", "checkpoint", "target score", "ICL", "format share (%)", *tasks, "seeds"
    ]  # fmt: skip
    rows = {tuple(row[:3]): row for row in table.rows[1:]}
    last = f"step {data.methods['promot'][0].curve[-1].step}"
    row = rows["ProMoT", "learning_rate 0.5", last]
    assert row[4] == "40.5" and row[-1] == "2" and all(cell.endswith(" / 80.0") for cell in row[6:-1])
    assert [key for key in rows if key[0] == "pretrained"] == [("pretrained", "-", "-")]
    assert not any(key[1] == "learning_rate 0.1" and key[2] == last for key in rows)  # not scored at that rate
    assert "what is lost is the format" in table.reading
    (alone,) = [tested(run) for run in data.methods["promot"] if run.seed == 0]
    (one,) = blocks.wide(Comparison(methods={"promot": [alone]}))
    assert "[" in one.rows[1][3] and "[" in one.rows[1][4]
    path = markdown.write(replace(data, methods=methods), tmp_path)
    for name in (path, path.with_suffix(".html")):
        assert "Every checkpoint" in name.read_text()
    assert "Every checkpoint" not in terminal.table(replace(data, methods=methods))


def test_one_seed_is_told() -> None:
    paired, area = blocks.leading(swept(1))
    assert {row[4] for row in paired.rows[1:]} == {"1: examples only"}
    assert {row[-1] for row in area.rows[1:]} == {"examples"}


def test_every_report_begins_with_the_frontier_and_the_paired_differences(tmp_path: Path) -> None:
    data = swept()
    one = markdown.write(data, tmp_path / "a" / "sst2 x")
    several = markdown.write_tasks({"sst2 x": data}, tmp_path / "a", {"sst2 x": one})
    page = html.unescape((tmp_path / "a" / "sst2 x" / "report.html").read_text())
    terms = ["Paired differences", "Area of the frontier", "KEPT", "At matched target score", "of each ICL task"]
    for text, kept in (
        (html.unescape(one.read_text()), "## Scores"),
        (html.unescape(several.read_text()), "### Scores"),
        (page[page.index("<main") :], "Overview: test split"),
    ):
        places = [text.index("Up and to the right is better."), *(text.index(t.replace("KEPT", kept)) for t in terms)]
        assert places == sorted(places)
    assert "](sst2%20x/figures/frontier.svg)" in several.read_text()
    assert (tmp_path / "a" / "sst2 x" / "figures" / "frontier.svg").is_file()
    printed = terminal.table(data)
    assert printed.index("Norm. Avg.") < printed.index("Paired differences") < printed.index("At matched target score")
