"""From results to the paper's tables: `report.md` with figures, and `report.html` beside it."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from promot_jax.files import write_text
from promot_jax.methods import label
from promot_jax.report import blocks, figures, tables
from promot_jax.report.html import visible
from promot_jax.report.page import browser, page
from promot_jax.report.svg import Chart, document
from promot_jax.results.comparison import as_comparison
from promot_jax.results.schema import Comparison, GradientAlignment, Run

METHODS_ACROSS = 4  # wider Markdown tables cannot be read without scrolling
SAMPLE_LENGTH = 240

_SPECIAL = re.compile(r"[&<>`*\[\]\\|~!#$^{}@\"]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=[wW]{3})\.")


def write(results: Run | Comparison, folder: str | os.PathLike[str], analysed: Sequence[Path] = ()) -> Path:
    """Writes `report.md` with its figures (`figures/*.svg`), and `report.html`, into a folder.

    Args:
        results: a comparison, or a single run. Methods, seeds, tasks and curves that are missing show as "-".
        folder: created if need be.
        analysed: further folders whose gradient alignments are shown.

    Returns:
        Path of `report.md`.

    Raises:
        UserError: a gradient alignment is not in its layout.
    """
    results = as_comparison(results)
    folder = Path(folder)
    shares = tables.format_shares(results)
    parts = [f"# {page.TITLE}", _facts([results], folder)]
    parts += [*_images(figures.first(results), folder, "##"), *_tables(blocks.leading(results))]
    parts += ["## Scores", _listing(tables.TERMS), _scores(tables.scores(results)), *_blocks(results)]
    if missing := tables.unfinished(results):
        parts += ["## Cells that are not here", "\n".join(f"- {escape(line)}" for line in missing)]
    if shares.rows:
        parts += ["## Format share per task (%)", _scores(shares)]
    parts += ["## Figures", *_figures(results, folder)]
    if aligned := page.alignments(folder, *analysed):
        parts += ["## Gradient alignment", *_alignments(aligned, folder)]
    if samples := _samples(results):
        parts += ["## Sample outputs", *samples]
    parts += ["## Settings", _settings(results)]
    page.write({"": results}, folder, analysed=analysed)
    return write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def write_tasks(
    by_task: Mapping[str, Comparison], folder: Path, reports: Mapping[str, Path], analysed: Sequence[Path] = ()
) -> Path:
    """Writes the `report.md` and `report.html` of several fine-tuning tasks together, as `write`.

    `reports` are the `report.md` of each task, in `folder` or below it.
    """
    parts = [
        f"# {page.TITLE}",
        _facts(list(by_task.values()), folder),
        "## How to read the tables",
        _listing(tables.TERMS),
    ]
    for task, results in by_task.items():
        link = quote(reports[task].relative_to(folder).as_posix())
        parts += [f"## {escape(task)}", f"[Figures, samples and settings]({link})"]
        for chart in figures.first(results):  # which the task's own report has written
            path = reports[task].relative_to(folder).parent / _figure(chart)
            parts.append(_image(chart, quote(path.as_posix())))
        parts += [*_tables(blocks.leading(results), "###"), "### Scores", _scores(tables.scores(results))]
        parts += _blocks(results, "###")
    page.write(by_task, folder, analysed=analysed)
    return write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def _settings(results: Comparison) -> str:
    """Methods side by side: a row per setting, with the value of each stage where they differ.

    What is off in every run is left out.
    """
    methods = results.methods
    rows = [["", *(escape(label(method)) for method in methods)]]
    rows.append(["seeds", *(_listed(run.seed for run in runs) for runs in methods.values())])
    rows.append(["seconds", *(_listed(_whole(run.seconds) for run in runs) for runs in methods.values())])
    by_setting: dict[str, dict[str, dict[str, list[Any]]]] = {}  # setting, method, stage
    for run in results.runs:
        for key, value in run.settings.items():
            stage = next((stage for stage in run.steps if key.startswith(f"{stage}/")), "")
            by_stage = by_setting.setdefault(key.removeprefix(f"{stage}/"), {}).setdefault(run.method, {})
            by_stage.setdefault(stage, []).append(value)
    for name, by_method in by_setting.items():
        if any(value for stages in by_method.values() for values in stages.values() for value in values):
            rows.append([escape(name), *(_by_stage(by_method.get(method, {})) for method in methods)])
    return markdown(rows)


def _by_stage(values: dict[str, list[Any]]) -> str:
    listed = {stage: _listed(members) for stage, members in values.items()}
    if len(set(listed.values())) < 2:
        return next(iter(listed.values()), tables.ABSENT)
    return "; ".join(f"{escape(stage)}: {text}" for stage, text in listed.items())


def _listed(values: Iterable[Any]) -> str:
    """The different values, escaped, in order; "-" for none."""
    known = dict.fromkeys(str(value) for value in values if value is not None)
    return ", ".join(map(escape, known)) or tables.ABSENT


def _whole(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.0f}"


def _scores(scores: tables.Table) -> str:
    if not scores.rows:
        return "No scores."
    return "\n\n".join([markdown_table(scores), *map(escape, scores.notes)])


def _facts(comparisons: Sequence[Comparison], folder: Path) -> str:
    return _listing({name: ", ".join(values) for name, values in tables.facts(comparisons, folder).items()})


def _listing(items: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {escape(text)}" for name, text in items.items())


def _tables(found: Sequence[blocks.Block], level: str = "##") -> list[str]:
    """Tables of text, each under its title and above how it is read."""
    parts: list[str] = []
    for title, rows, reading in found:
        table = markdown([[escape(cell) for cell in row] for row in rows])
        parts += [f"{level} {title}", table, escape(reading)]
    return parts


def _blocks(results: Comparison, level: str = "##") -> list[str]:
    """The tables beside the scores; under that at matched target score, all tasks at those checkpoints."""
    parts = _tables([*blocks.further(results), *blocks.wide(results)], level)
    for split, scores in tables.at_matched_score(results).items():
        parts += [f"{level} Every task at matched target score, {split}", _scores(scores)]
    return parts


def _figures(results: Comparison, folder: Path) -> list[str]:
    images = _images(figures.charts(results), folder)
    reading = "Lines: mean over seeds. Bands: range over seeds. Scores of the validation split."
    return [reading, *images] if images else ["No run has a curve."]


def _alignments(aligned: Sequence[GradientAlignment], folder: Path) -> list[str]:
    drawn = [figures.gradient_alignment(found) for found in aligned]
    named = [replace(one, name=f"{one.name}_{i}") for i, charts in enumerate(drawn) for one in charts]
    return [tables.aligned_reading(aligned), *_images(named, folder)]


def _images(drawn: Sequence[Chart], folder: Path, level: str = "###") -> list[str]:
    parts = []
    for chart in drawn:
        write_text(folder / _figure(chart), document(chart))
        parts.append(f"{level} {escape(chart.title)}\n\n{_image(chart, _figure(chart))}")
    return parts


def _figure(chart: Chart) -> str:
    """Where a chart is written, below the folder of its report."""
    return f"figures/{chart.name}.svg"


def _image(chart: Chart, link: str) -> str:
    """A written chart, with how it is read."""
    return f"![{escape(chart.alt)}]({link})" + (f"\n\n{escape(chart.note)}" if chart.note else "")


def _samples(results: Comparison) -> list[str]:
    """The first sample of each task, method beside method, of the lowest seed that has any; `report.html` has all."""
    samples = browser.samples({"": results})
    if not samples:
        return []
    seed = min(sample["seed"] for sample in samples)
    first = {(sample["task"], sample["shots"]): sample for sample in reversed(samples) if sample["seed"] == seed}
    written = {name for sample in samples for name, _, _ in sample["outputs"]}
    shown = [name for name in map(label, tables.ordered(results.methods)) if name in written]
    rows = [["task", "input", "right answer", *map(escape, shown)]]
    for (task, shots), sample in sorted(first.items()):
        outputs = {name: code(_start(text)) for name, text, _ in sample["outputs"]}
        name = escape(task + (f" ({shots}-shot)" if shots else ""))
        cells = [code(_end(sample["input"])), code(_start(sample["target"]))]
        rows.append([name, *cells, *(outputs.get(method, tables.ABSENT) for method in shown)])
    return [f"Seed {seed}; what the models wrote, as it is, apart from length.", markdown(rows)]


def _start(text: str) -> str:
    return text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + "…"


def _end(text: str) -> str:
    """The end of an input, where the query is; exemplars come before it."""
    return text if len(text) <= SAMPLE_LENGTH else "…" + text[-SAMPLE_LENGTH:]


def escape(text: str) -> str:
    """Makes any text safe inside a Markdown line (not at its start) or table cell, and as HTML text.

    Nothing in it renders as markup or ends a cell; what shows is the text itself, line breaks included. Characters that
    would not show (control characters, direction overrides, lone surrogates) become U+FFFD, tabs become spaces.
    """
    text = visible(text).replace("\t", " ")
    text = _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)
    # Some renderers look for e-mail addresses after decoding; a break opportunity ends the run of text before the sign.
    return text.replace("&#64;", "<wbr>&#64;").replace("\n", "<br>")


def code(text: str) -> str:
    """`escape`, set as code, where renderers leave mentions and emoji codes alone that they replace elsewhere."""
    return f"<code>{escape(text)}</code>"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are safe already, the header first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_table(scores: tables.Table) -> str:
    """Scores with their intervals below them; a few methods side by side, the others in further tables."""
    blocks = []
    for start in range(0, len(scores.methods), METHODS_ACROSS):
        columns = scores.columns(scores.methods[start : start + METHODS_ACROSS])
        names = [f"{escape(label(method))} {f'{shots}-shot' if shots else ''}".strip() for method, shots in columns]
        rows = [["", *names]]
        for row in scores.rows:
            parts = [scores.parts(row, column) for column in columns]
            cells = [f"{main}<br><sub>{interval}</sub>" if interval else main for main, interval in parts]
            rows.append([escape(row.label), *cells])
        blocks.append(markdown(rows))
    return "\n\n".join(blocks)
