"""The report and its tables, from random results. No number here was measured."""

import html
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_results import FIGURES, NASTY, TASKS, alignment, made, prune, random_document, random_results, random_run

from promot_jax import files
from promot_jax.methods import METHODS, label
from promot_jax.report import blocks, figures, markdown, tables, terminal
from promot_jax.report import html as markup
from promot_jax.report.page import page
from promot_jax.report.svg import document
from promot_jax.results import records
from promot_jax.results.comparison import comparison
from promot_jax.results.schema import Run
from promot_jax.results.scores import Icl, Score, StepEvaluation, Target


def with_target(method, seed, score, ci95=None, icl=None, **target):
    """A run of one target score and the ICL scores given."""
    target = Target(task="sentiment", metric="accuracy", score=score, ci95=ci95, n=10, **target)
    return Run(method=method, seed=seed, steps={}, target=target, icl=icl or {}, curve=[])


def scores(*runs):
    """The table of some runs."""
    return tables.scores(comparison(runs))


def test_cells_are_means_over_seeds_with_their_range_and_paired_difference():
    pretrained = [with_target("pretrained", 0, 10.0), with_target("pretrained", 1, 20.0)]
    cells = scores(*pretrained, with_target("promot", 0, 90.0), with_target("promot", 1, 94.0)).rows[0].cells
    assert cells["promot", None] == tables.Cell(92.0, 90.0, 94.0, change=77.0, seeds=2)
    assert cells["pretrained", None] == tables.Cell(15.0, 10.0, 20.0, change=None, seeds=2)
    cells = scores(*pretrained, with_target("promot", 1, 94.0, ci95=(91.0, 97.0))).rows[0].cells
    # One seed: its bootstrap interval, and the difference to pretrained of the same seed.
    assert cells["promot", None] == tables.Cell(94.0, 91.0, 97.0, change=74.0, seeds=1)
    assert cells["promot", None].main() == "94.0 (+74.0)"
    assert cells["promot", None].interval() == "[91.0, 97.0]"


def test_difference_where_no_seed_is_shared():
    table = scores(with_target("pretrained", 7, 10.0), with_target("promot", 0, 90.0))
    assert table.rows[0].cells["promot", None].change == 80.0
    assert tables.signed(-0.04) == "+0.0"


def test_tasks_of_a_mixture_have_rows_of_their_own():
    runs = [with_target("promot", 0, 70.0)]  # written before they were kept apart
    for name, score, accuracy, bleu in (("pretrained", 20.0, 30.0, 10.0), ("finetune", 60.0, 80.0, 40.0)):
        tasks = {
            "rte": Score(metric="accuracy", score=accuracy, ci95=(accuracy - 1, accuracy + 1), n=5),
            "wmt14_enfr": Score(metric="bleu", score=bleu, n=5),
        }
        runs.append(with_target(name, 0, score, tasks=tasks))
    rows = {row.label: row.cells for row in scores(*runs).rows}
    assert list(rows) == ["sentiment (accuracy, target)", "rte (accuracy, target)", "wmt14_enfr (bleu, target)"]
    assert rows["rte (accuracy, target)"]["finetune", None] == tables.Cell(80.0, 79.0, 81.0, change=50.0, seeds=1)
    assert rows["wmt14_enfr (bleu, target)"]["finetune", None].main() == "40.0 (+30.0)"
    assert ("promot", None) not in rows["wmt14_enfr (bleu, target)"]


def test_targets_that_were_asked_behind_an_exemplar_are_named():
    table = scores(with_target("promot", 0, 80.0), with_target("promot_1shot", 0, 80.0, shots=1))
    note = "Evaluated on the target with exemplars in the input, as trained: ProMoT + 1-shot (1-shot)."
    assert table.notes == [note]


def test_gradient_alignments_are_drawn(tmp_path):
    for name, stage in (("one", "finetune"), ("two", "stage2")):
        files.write(alignment(stage=stage), tmp_path / "analyses" / name / "results.json")
    made = markdown.write(random_results(), tmp_path / "report", analysed=[tmp_path]).read_text("utf-8")
    drawn = re.findall(r"\]\(figures/(gradient_alignment\w*)\.svg\)", made)
    assert len(set(drawn)) == len(drawn) == 4  # with a prompt and without
    assert all((tmp_path / "report/figures" / f"{name}.svg").is_file() for name in drawn)
    assert (
        "seed 0, with its soft prompt" in made
        and "50 % (finetune on sentiment, seed 0), 50 % (stage2 on sentiment, seed 0)" in made
    )


def test_averages_over_different_tasks_are_not_shown_side_by_side():
    def entry(*names):
        task = Score(metric="exact_match", score=50.0, n=10, format_share=1.0)
        return {"1": Icl.of(dict.fromkeys(names, task))}

    table = scores(
        with_target("pretrained", 0, 10.0, icl=entry("a", "b")), with_target("promot", 0, 90.0, icl=entry("a"))
    )
    rows = {row.label: row.cells for row in table.rows}
    assert ("pretrained", "1") in rows["Norm. Avg."]
    assert ("promot", "1") not in rows["Norm. Avg."]
    assert ("promot", "1") in rows["a (exact match)"]
    assert table.notes == ["Not in the averages, as tasks are missing: ProMoT (seed 0, 1-shot)."]


def test_terms_are_explained_where_they_are_read(tmp_path):
    """Terminal, Markdown and page say the same of each term; the head says what was run, where and when."""
    data = random_results()
    reports = [markdown.write(data, tmp_path), markdown.write_tasks({"a": data}, tmp_path / "b", {"a": tmp_path / "b"})]
    texts = [terminal.table(data, width=10_000), *(path.read_text() for path in reports), page.render({"": data})]
    for text in map(html.unescape, texts):
        assert "Step 0 is before" in text and "Matched target score: " in text
        for term, meaning in tables.TERMS.items():
            assert re.search(f"{re.escape(term)}(: |</dt><dd>){re.escape(meaning)}", text), term
    texts = [html.unescape((tmp_path / name).read_text()) for name in ("report.md", "report.html")]
    texts = [re.sub("</?span[^>]*>", "", text) for text in texts]
    for text in texts:
        assert str(tmp_path) in text and re.search(r"Date\W+(?:dt|dd|\W)*20\d\d-\d\d-\d\d", text)
        assert "stage2 60" in text and "0.0001" in text
        assert "two seeds: " in text  # no interval of two


def test_icl_tasks_that_share_labels_with_the_target_are_named(tmp_path):
    """They have a score, and no format share."""
    data = random_document()
    assert not tables.format_shares(made(data)).notes
    for runs in data["methods"].values():
        for run in runs:
            for icl in run["icl"].values():
                icl["tasks"]["capital"]["format_share"] = None
    note = "No format share, as a label of theirs is one of the target's: capital."
    assert tables.format_shares(made(data)).notes == tables.scores(made(data)).notes == [note]
    shares = markdown.write(made(data), tmp_path).read_text().partition("## Format share per task")[2]
    shown = shares.partition("## ")[0]
    assert html.unescape(shown).count(note) == 1 and "| capital" not in shown
    assert html.unescape(page.render({"": made(data)})).count(note) == 2
    for runs in data["methods"].values():  # an open target: no task has a format share
        for run in runs:
            for icl in run["icl"].values():
                for task in icl["tasks"].values():
                    task["format_share"] = None
    assert not tables.scores(made(data)).notes


def test_every_method_has_a_label():
    labels = [method.label for method in METHODS.values()]
    assert all(labels) and len(set(labels)) == len(labels)
    assert label("multitask_promot_1shot") == "multi-task ProMoT + 1-shot"
    assert label("finetune_16shot") == "fine-tuning + 16-shot"
    assert label("some_other") == "some other"


def test_models_between_two_are_told_by_alpha(tmp_path):
    points = [(0, 5.0, 50.0), (30, 99.0, 40.0), (100, 99.5, 30.0)]
    curve = [
        StepEvaluation(step=step, stage="wise_ft", target=target, icl=icl, format_share=1.0, alpha=step / 100)
        for step, target, icl in points
    ]
    steps = {"finetune": 60, "wise_ft": 30}
    runs = [records.replace(random_run("wise_ft", seed), steps=steps, curve=curve) for seed in (0, 1)]
    data, run = comparison([*random_results(seeds=2).runs, *runs]), runs[-1]
    rows = blocks.matched(data).rows
    assert next(row for row in rows if row[0] == "WiSE-FT")[1] == "alpha 0.30, alpha 0.30"
    assert "alpha" not in next(row for row in rows if row[0] == "ProMoT")[1]
    text = page.write({"": data}, tmp_path).read_text()
    tradeoff = figures.charts(data)[0]
    assert all("alpha 0.30" in told for told in (text, document(tradeoff), document(figures.of_run(run))))
    assert "WiSE-FT, seed 0, alpha 0.30: target 99.0, ICL 40.0" in document(tradeoff)
    assert not re.search(r"WiSE-FT[^<>]*step", text)
    assert figures.of_run(run).panels[0].x == "Alpha (%)"


def test_terminal_table_has_every_row_and_fits():
    text = terminal.table(random_results())
    for name in ("sentiment (accuracy, target)", *(f"{name} (" for name in TASKS), "Norm. Avg.", "format share (%)"):
        assert f"\n{name}" in text
    assert "1-shot" in text
    assert "At matched target score" in text
    assert max(map(len, text.splitlines())) <= 120
    many = random_results(methods=("pretrained", *(f"method_{index}" for index in range(7))))
    wide = terminal.table(many, width=100)
    assert max(map(len, wide.split("At matched target score")[0].splitlines())) <= 100
    assert all(f"method {index}" in wide for index in range(7))


def test_terminal_table_is_aligned():
    lines = terminal.table(random_results()).split("\n\n")[0].splitlines()
    rows = [line for line in lines[3:] if "(exact match)" in line or "Norm." in line]
    assert len({len(line) for line in rows}) == 1


def test_report_is_complete_and_the_same_every_time(tmp_path):
    data = random_results()
    first, second = (markdown.write(data, tmp_path / name) for name in ("a", "b"))
    text = first.read_text()
    assert text.replace(str(tmp_path / "a"), str(tmp_path / "b")) == second.read_text()
    for words in ("random_weights", "sentiment", "0123456789ab-dirty", "jax 0.10.2"):
        assert words in text
    assert "learning_rate" in text
    names = re.findall(r"!\[(.*)\]\(figures/(.*?\.svg)\)", text)
    assert [name for _, name in names] == [f"{name}.svg" for name in FIGURES]
    for alt, name in names:
        assert re.search("ProMoT((: target|: capital)? from|: area)", alt)
        drawing = (tmp_path / "a" / "figures" / name).read_bytes()
        assert drawing == (tmp_path / "b" / "figures" / name).read_bytes()
        ElementTree.fromstring(drawing)
        assert b"<dc:date>" not in drawing


def test_report_shows_all_tasks_at_the_matched_checkpoint_where_runs_have_them(tmp_path):
    data = random_document(seeds=1)
    assert "Every task at matched target score" not in markdown.write(made(data), tmp_path).read_text()
    for method in data["methods"]:
        run = data["methods"][method][0]
        other = random_run(method, 99)
        run["matched"] = files.plain({"step": 20, "target": other.target, "icl": other.icl})
    text = markdown.write(made(data), tmp_path).read_text()
    shown = text.split("Every task at matched target score, validation split")[1].split("## Format share")[0]
    for method in data["methods"]:
        assert f"{data['methods'][method][0]['matched']['target']['score']:.1f}" in shown
    del data["methods"]["pretrained"][0]["matched"]
    shown = (
        markdown.write(made(data), tmp_path)
        .read_text()
        .split("Every task at matched target score, validation split")[1]
        .split("## Format share")[0]
    )
    assert "pretrained" not in shown


def test_seeds_of_different_length_give_a_mean_only_where_all_have_a_value():
    data = random_document()
    del data["methods"]["promot"][1]["curve"][-3:]
    promot = next(one for one in figures.series(made(data), figures.ICL_AVERAGE) if one.method == "promot")
    assert promot.common() == [0, 10, 20, 30]
    assert len(promot.values[0]) == 7
    assert figures.series(made(data), figures.TARGET_SCORE, stages=("stage1",))[0].method == "promot"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_the_report_is_written(tmp_path, seed):
    data = random_document(seeds=3)
    prune(data, random.Random(seed))
    results = made(data)
    assert markdown.write(results, tmp_path).read_text().startswith("# ProMoT report")
    assert terminal.table(results).endswith("\n")
    assert results == made(data)


def test_missing_scores_show_as_a_dash(tmp_path):
    data = random_document()
    data["methods"]["promot"] = []
    for run in data["methods"]["finetune"]:
        del run["icl"]["4"]
    row = next(line for line in terminal.table(made(data)).splitlines() if line.startswith("capital"))
    assert row.split()[-3:] == ["-", "-", "-"]
    assert re.search(r"\| capital .* \| - \| - \| - \|\n", markdown.write(made(data), tmp_path).read_text())


@pytest.mark.parametrize("data", [{"methods": {}}, {"methods": {"promot": []}}])
def test_nothing_at_all(tmp_path, data):
    assert "No scores." in markdown.write(made(data), tmp_path).read_text()
    assert terminal.table(made(data))


def test_single_run(tmp_path):
    assert "ProMoT" in terminal.table(random_run("promot", 0))
    assert "ProMoT" in markdown.write(random_run("promot", 0), tmp_path).read_text()


def test_samples_stand_method_beside_method(tmp_path):
    data = random_document()
    for method, output in (("pretrained", "Paris"), ("finetune", "True")):
        sample = {"task": "capital", "shots": 1, "input": "x" * 500 + "Capital:", "target": "Paris", "output": output}
        data["methods"][method][0]["samples"] = [sample]
    text = markdown.write(made(data), tmp_path).read_text().split("## Sample outputs")[1]
    assert "| task | input | right answer | pretrained | fine-tuning |" in text
    row = next(line for line in text.splitlines() if line.startswith("| capital (1-shot)"))
    assert row.endswith("| <code>Paris</code> | <code>Paris</code> | <code>True</code> |")
    assert "Capital:</code>" in row
    assert len(row) < 500


def visible(text):
    """What a reader should see: one kind of line break, tabs as spaces, a mark for what does not show."""
    return markup.visible(text).replace("\t", " ")


@settings(deadline=None, max_examples=300)
@given(st.lists(NASTY, min_size=3, max_size=3))
@example(["\\|", "a\\", "|"])
@example(["a@b.org", "www.a.org", "https://a.org"])
def test_model_output_never_renders_as_markup_nor_breaks_the_table(outputs):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    rows = [["task", "output"], *([markdown.escape(text), markdown.code(text)] for text in outputs)]
    tokens = parser.parse("before\n\n" + markdown.markdown(rows) + "\n\nafter\n")
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
    escaped = markdown.escape(text)
    assert set(re.findall(r"<[^>]*>?", escaped)) <= {"<br>", "<wbr>"}
    assert '"' not in escaped
    assert html.unescape(escaped.replace("<wbr>", "").replace("<br>", "\n")) == visible(text)
    escaped.encode("utf-8")


def test_names_of_tasks_and_methods_are_escaped_too(tmp_path):
    data = random_document(seeds=1)
    run = data["methods"].pop("finetune")[0] | {
        "method": "<b>|x|</b> $a$",
        "model": "<script>",
        "settings": {"<i>": "<u>|"},
    }
    run["icl"]["1"]["tasks"]["<td>|"] = run["icl"]["1"]["tasks"]["capital"]
    run["target"]["task"] = "![x](y)"
    data["methods"][run["method"]] = [run]
    text = markdown.write(made(data), tmp_path).read_text()
    assert not re.findall(r"<(?!br>|sub>|/sub>)", text)
    assert "![x]" not in text


def test_models_between_two_are_in_the_trade_off_but_on_no_axis_of_steps():
    data = random_document(methods=("pretrained", "finetune", "wise_ft"))
    for run in data["methods"]["wise_ft"]:
        run["curve"] = [point | {"alpha": point["step"] / 100} for point in run["curve"]]
    assert [one.method for one in figures.series(made(data), figures.ICL_AVERAGE)] == ["finetune"]
    (panel,) = next(chart for chart in figures.charts(made(data)) if chart.name == "tradeoff").panels
    assert {line.label for line in panel.lines} >= {"fine-tuning", label("wise_ft")}


def test_settings_are_told_once_and_by_stage_where_stages_differ(tmp_path):
    data = random_document(seeds=1, methods=("pretrained", "promot"))
    (run,) = data["methods"]["promot"]
    run["steps"] = {"stage1": 200, "stage2": 60}
    run["settings"] = {"dtype": "float32", "stage1/rate": 0.3, "stage2/rate": 0.1, "stage1/kl": 0.0, "stage2/kl": 0.0}
    run["settings"] |= {"stage1/batch_size": 8, "stage2/batch_size": 8}
    text = markdown.write(made(data), tmp_path).read_text("utf-8").partition("## Settings")[2]
    assert "| rate | - | stage1: 0.3; stage2: 0.1 |" in text
    assert re.search(r"\| batch_?size \| - \| 8 \|", text.replace("\\", ""))
    assert "kl" not in text  # off
