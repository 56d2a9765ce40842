"""The report and its tables, from random results. No number here was measured."""

import copy
import html
import random
import re
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promot_jax import figures, report, results, tables
from promot_jax.errors import UserError

TASKS = {"capital": "exact_match", "past_tense": "exact_match", "negation": "rouge2", "reading_qa": "token_f1"}
STEPS = {"pretrained": {}, "finetune": {"finetune": 60}, "promot": {"stage1": 60, "stage2": 60}}


def random_run(method, seed):
    """A run of random scores and curves."""
    draw = random.Random(f"{method} {seed}")

    def score(metric, **extra):
        middle = draw.uniform(10, 90)
        return {"metric": metric, "score": middle, "ci95": [middle - 9, middle + 9], "n": 50, **extra}

    def entry():
        scores = {name: score(metric, format_share=draw.uniform(0, 40)) for name, metric in TASKS.items()}
        return results.icl_result(scores, ci95=[30.0, 50.0])

    steps = STEPS.get(method, {"finetune": 60})
    return {
        "method": method,
        "seed": seed,
        "steps": dict(steps),
        "seconds": draw.uniform(10, 400),
        "target": {"task": "sentiment", **score("accuracy")},
        "icl": {shots: entry() for shots in ("1", "4")},
        "curve": [point for stage in steps for point in random_curve(stage, draw)],
        "versions": {"python": "3.11.9", "jax": "0.10.2", "promot_jax": None},
        "commit": "0123456789abcdef-dirty",
        "model": "random_weights",
        "settings": {"learning_rate": 1e-4, "curve_shots": 1},
    }


def random_curve(stage, draw):
    """Target scores that rise, ICL that falls."""
    target, icl, share, points = draw.uniform(0, 10), draw.uniform(48, 55), 0.0, []
    for step in range(0, 61, 10):
        scores = {"target": target} if stage == "stage1" else {"target": target, "icl": icl, "format_share": share}
        points.append(results.curve_point(step, stage, loss=draw.random(), **scores))
        target, icl, share = (
            min(95, target + draw.uniform(0, 30)),
            icl * draw.uniform(0.7, 1),
            share + draw.random() * 15,
        )
    return points


def random_results(seeds=2, methods=("pretrained", "finetune", "promot")):
    """Random runs of several methods and seeds."""
    return {"methods": {method: [random_run(method, seed) for seed in range(seeds)] for method in methods}}


def with_target(method, seed, score, ci95=None, icl=None):
    """A run of one target score and the ICL entries given."""
    target = results.target_result("sentiment", "accuracy", score, ci95=ci95, n=10)
    return {"method": method, "seed": seed, "steps": {}, "target": target, "icl": icl or {}, "curve": []}


def test_cells_are_means_over_seeds_with_their_range_and_paired_difference():
    runs = {
        "pretrained": [with_target("pretrained", 0, 10.0), with_target("pretrained", 1, 20.0)],
        "promot": [with_target("promot", 0, 90.0), with_target("promot", 1, 94.0)],
    }
    cells = tables.scores({"methods": runs}).rows[0].cells
    assert cells["promot", None] == tables.Cell(92.0, 90.0, 94.0, change=77.0, seeds=2)
    assert cells["pretrained", None] == tables.Cell(15.0, 10.0, 20.0, change=None, seeds=2)
    del runs["promot"][0]
    runs["promot"][0]["target"]["ci95"] = [91.0, 97.0]
    cells = tables.scores({"methods": runs}).rows[0].cells
    # One seed: its bootstrap interval, and the difference to pretrained of the same seed.
    assert cells["promot", None] == tables.Cell(94.0, 91.0, 97.0, change=74.0, seeds=1)
    assert cells["promot", None].main() == "94.0 (+74.0)"
    assert cells["promot", None].interval() == "[91.0, 97.0]"


def test_difference_where_no_seed_is_shared():
    runs = {"pretrained": [with_target("pretrained", 7, 10.0)], "promot": [with_target("promot", 0, 90.0)]}
    assert tables.scores({"methods": runs}).rows[0].cells["promot", None].change == 80.0
    assert tables.signed(-0.04) == "+0.0"


def test_averages_over_different_tasks_are_not_shown_side_by_side():
    def entry(*names):
        task = results.task_result("exact_match", 50.0, ci95=None, n=10, format_share=1.0)
        return {"1": results.icl_result(dict.fromkeys(names, task))}

    runs = {
        "pretrained": [with_target("pretrained", 0, 10.0, icl=entry("a", "b"))],
        "promot": [with_target("promot", 0, 90.0, icl=entry("a"))],
    }
    table = tables.scores({"methods": runs})
    rows = {row.label: row.cells for row in table.rows}
    assert ("pretrained", "1") in rows["Norm. Avg."]
    assert ("promot", "1") not in rows["Norm. Avg."]
    assert ("promot", "1") in rows["a (exact match)"]
    assert table.notes == ["Not in the averages, as tasks are missing: ProMoT (seed 0, 1-shot)."]


def test_terminal_table_has_every_row_and_fits():
    text = report.table(random_results())
    for name in ("sentiment (accuracy, target)", *(f"{name} (" for name in TASKS), "Norm. Avg.", "format share (%)"):
        assert f"\n{name}" in text
    assert "1-shot" in text
    assert "At matched target score" in text
    assert max(map(len, text.splitlines())) <= 120
    many = random_results(methods=("pretrained", *(f"method_{index}" for index in range(7))))
    wide = report.table(many, width=100)
    assert max(map(len, wide.split("In parentheses")[0].splitlines())) <= 100
    assert all(f"method {index}" in wide for index in range(7))


def test_tolerance_of_the_matched_score_is_passed_on_and_told(tmp_path):
    data = random_results()
    for text in (report.table(data, tolerance=2.5), report.write(data, tmp_path, tolerance=2.5).read_text()):
        assert "less a tolerance of 2.5." in text


def test_terminal_table_is_aligned():
    lines = report.table(random_results()).split("\n\n")[0].splitlines()
    rows = [line for line in lines[3:] if "(exact match)" in line or "Norm." in line]
    assert len({len(line) for line in rows}) == 1


def test_report_is_complete_and_the_same_every_time(tmp_path):
    data = random_results()
    first, second = (report.write(data, tmp_path / name) for name in ("a", "b"))
    text = first.read_text()
    assert text == second.read_text()
    for words in ("random_weights", "sentiment", "0123456789abcdef-dirty", "jax 0.10.2"):
        assert words in text
    assert "learning_rate" in text
    names = re.findall(r"!\[(.*)\]\(figures/(.*?\.svg)\)", text)
    assert [name for _, name in names] == ["icl.svg", "format_share.svg", "target.svg", "tradeoff.svg"]
    for alt, name in names:
        assert "ProMoT from" in alt
        drawing = (tmp_path / "a" / "figures" / name).read_bytes()
        assert drawing == (tmp_path / "b" / "figures" / name).read_bytes()
        ElementTree.fromstring(drawing)
        assert b"<dc:date>" not in drawing


def test_report_shows_all_tasks_at_the_matched_checkpoint_where_runs_have_them(tmp_path):
    data = random_results(seeds=1)
    assert "at those checkpoints" not in report.write(data, tmp_path).read_text()
    for method in ("finetune", "promot"):
        run = data["methods"][method][0]
        other = random_run(method, 99)
        run["matched"] = {"step": 20, "target": other["target"], "icl": other["icl"]}
    text = report.write(data, tmp_path).read_text()
    shown = text.split("at those checkpoints")[1].split("## Format share")[0]
    assert f"{data['methods']['promot'][0]['matched']['target']['score']:.1f}" in shown
    assert f"{data['methods']['pretrained'][0]['target']['score']:.1f}" in shown


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Matplotlib is not installed" in report.write(random_results(seeds=1), tmp_path).read_text()


def test_seeds_of_different_length_give_a_mean_only_where_all_have_a_value():
    data = random_results()
    del data["methods"]["promot"][1]["curve"][-3:]
    promot = next(one for one in figures.series(data, "icl") if one.method == "promot")
    assert promot.common() == [0, 10, 20, 30]
    assert len(promot.values[0]) == 7
    assert figures.series(data, "target", stages=("stage1",))[0].method == "promot"


def prune(data, draw):
    """Drops parts of results at random, as kills, failures and open tasks would."""
    for method in list(data["methods"]):
        if draw.random() < 0.3:
            del data["methods"][method]
            continue
        data["methods"][method] = [run for run in data["methods"][method] if draw.random() < 0.7]
        for run in data["methods"][method]:
            if draw.random() < 0.3:
                run["target"] = None
            elif draw.random() < 0.3:
                run["target"] |= {"score": None, "ci95": None}
            run["icl"] = {shots: entry for shots, entry in run["icl"].items() if draw.random() < 0.7}
            for entry in run["icl"].values():
                entry["tasks"] = {name: task for name, task in entry["tasks"].items() if draw.random() < 0.7}
                for task in entry["tasks"].values():
                    task |= {key: None for key in ("score", "ci95", "format_share") if draw.random() < 0.2}
                entry |= {key: None for key in ("norm_avg", "format_share") if draw.random() < 0.2}
            run["curve"] = [point for point in run["curve"] if draw.random() < 0.7]
            for point in run["curve"]:
                point |= {key: None for key in ("loss", "target", "icl", "format_share") if draw.random() < 0.2}
            for key in ("seconds", "versions", "commit", "model", "settings"):
                if draw.random() < 0.3:
                    run.pop(key)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_the_report_is_written(tmp_path, seed):
    data = random_results(seeds=3)
    prune(data, random.Random(seed))
    original = copy.deepcopy(data)
    assert report.write(data, tmp_path).read_text().startswith("# ProMoT report")
    assert report.table(data).endswith("\n")
    assert data == original


def test_missing_scores_show_as_a_dash(tmp_path):
    data = random_results()
    data["methods"]["promot"] = []
    for run in data["methods"]["finetune"]:
        del run["icl"]["4"]
    row = next(line for line in report.table(data).splitlines() if line.startswith("capital"))
    assert row.split()[-3:] == ["-", "-", "-"]
    assert re.search(r"\| capital .* \| - \| - \| - \|\n", report.write(data, tmp_path).read_text())


@pytest.mark.parametrize("data", [{"methods": {}}, {"methods": {"promot": []}}])
def test_nothing_at_all(tmp_path, data):
    assert "No scores." in report.write(data, tmp_path).read_text()
    assert report.table(data)


def test_single_run_and_foreign_data(tmp_path):
    assert "ProMoT" in report.table(random_run("promot", 0))
    with pytest.raises(UserError):
        report.write({"scores": 1}, tmp_path)


def test_samples_stand_method_beside_method(tmp_path):
    data = random_results()
    for method, output in (("pretrained", "Paris"), ("finetune", "True")):
        sample = {"task": "capital", "shots": 1, "input": "x" * 500 + "Capital:", "target": "Paris", "output": output}
        data["methods"][method][0]["samples"] = [sample]
    text = report.write(data, tmp_path).read_text().split("## Sample outputs")[1]
    assert "| task | input | target | pretrained | fine-tuning |" in text
    row = next(line for line in text.splitlines() if line.startswith("| capital (1-shot)"))
    assert row.endswith("| <code>Paris</code> | <code>Paris</code> | <code>True</code> |")
    assert "Capital:</code>" in row
    assert len(row) < 500


MARKUP = [
    *(
        "|",
        "\\|",
        "\\",
        "`",
        "``",
        "```",
        "| a | b |",
        "---",
        "\n",
        "\r\n",
        "\n\n",
        "\t",
        "    a",
        "# a",
        "> a",
        "1. a",
        "- a",
    ),
    *(
        "<b>",
        "</code>",
        "<!--",
        "-->",
        "<a@b.org>",
        "&lt;",
        "&#60;",
        "![x](y)",
        "[x](y)",
        "[x]: y",
        "$$",
        ":-)",
        "~~a~~",
    ),
    *("*a*", "**", "__a__", "_a_", "https://a.b", "www.a.b", "WWW.a.b", "a@b.org", "mailto:a@b.org"),
    *("\x00", "\u2028", "\u202e", "\ud800"),
]
NASTY = st.lists(st.text(max_size=8) | st.sampled_from(MARKUP), max_size=8).map("".join)


def visible(text):
    """What a reader should see: one kind of line break, tabs as spaces, a mark for what does not show."""
    return "".join(map(report._visible, text.replace("\r\n", "\n").replace("\r", "\n")))


@settings(deadline=None, max_examples=300)
@given(st.lists(NASTY, min_size=3, max_size=3))
@example(["\\|", "a\\", "|"])
@example(["a@b.org", "www.a.org", "https://a.org"])
def test_model_output_never_renders_as_markup_nor_breaks_the_table(outputs):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    rows = [["task", "output"], *([report.escape(text), report.code(text)] for text in outputs)]
    tokens = parser.parse("before\n\n" + report.markdown(rows) + "\n\nafter\n")
    blocks = [token.type for token in tokens if token.type not in ("inline", "paragraph_open", "paragraph_close")]
    row = ["tr_open", *["td_open", "td_close"] * 2, "tr_close"]
    head = ["thead_open", "tr_open", *["th_open", "th_close"] * 2, "tr_close", "thead_close"]
    assert blocks == ["table_open", *head, "tbody_open", *row * 3, "tbody_close", "table_close"]
    cells = [token for token in tokens if token.type == "inline"][3:-1]
    for text, cell in zip([text for text in outputs for _ in range(2)], cells, strict=True):
        tags = [child.content for child in cell.children if child.type == "html_inline"]
        assert set(tags) <= {"<code>", "</code>", "<br>", "<wbr>"}
        assert {child.type for child in cell.children} <= {"text", "html_inline"}
        parts = [child for child in cell.children if child.type == "text" or child.content == "<br>"]
        plain = "".join("\n" if child.type == "html_inline" else child.content for child in parts)
        assert plain.strip() == visible(text).strip()


@given(NASTY)
def test_escaped_text_is_safe_html(text):
    escaped = report.escape(text)
    assert set(re.findall(r"<[^>]*>?", escaped)) <= {"<br>", "<wbr>"}
    assert '"' not in escaped
    assert html.unescape(escaped.replace("<wbr>", "").replace("<br>", "\n")) == visible(text)
    escaped.encode("utf-8")


def test_names_of_tasks_and_methods_are_escaped_too(tmp_path):
    data = random_results(seeds=1)
    run = data["methods"].pop("finetune")[0] | {
        "method": "<b>|x|</b> $a$",
        "model": "<script>",
        "settings": {"<i>": "<u>|"},
    }
    run["icl"]["1"]["tasks"]["<td>|"] = run["icl"]["1"]["tasks"]["capital"]
    run["target"]["task"] = "![x](y)"
    data["methods"][run["method"]] = [run]
    text = report.write(data, tmp_path, title="<h1>").read_text()
    assert not re.findall(r"<(?!br>|sub>|/sub>)", text)
    assert "![x]" not in text
