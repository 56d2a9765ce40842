"""From results to the paper's tables: `report.md` with figures, and the same table for a terminal.

Besides the layout of `promot_jax.results.schema`, these keys of a run are shown where they are there:

- `model`: name of the base model;
- `settings`: flat object of what the run was done with; its `curve_shots` says at how many shots curves were evaluated;
- `samples`: list of `{"task", "input", "target", "output"}`, all text; if wanted with `shots`, `query` (where in the
  input the query begins) and `score` (of this output alone);
- `matched`: `{"step", "target", "icl"}`, the scores of the checkpoint at matched target score, laid out as in the run.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from promot_jax.files import write_text
from promot_jax.methods import label
from promot_jax.report import figures, tables
from promot_jax.report.html import visible
from promot_jax.report.page import page
from promot_jax.report.svg import Chart
from promot_jax.results.comparison import as_comparison

Json = dict[str, Any]

METHODS_ACROSS = 4  # wider Markdown tables cannot be read without scrolling
SAMPLES_PER_TASK = 1  # report.html has them all
SAMPLE_LENGTH = 240

_SPECIAL = re.compile(r"[&<>`*\[\]\\|~!#$^{}@\"]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=[wW]{3})\.")


def write(
    results: Json,
    folder: str | os.PathLike[str],
    *,
    title: str = "ProMoT report",
    analysed: Sequence[Path] = (),
) -> Path:
    """Writes `report.md` with its figures (`figures/*.svg`), and `report.html`, into a folder.

    Args:
        results: a comparison, or a single run. Methods, seeds, tasks and curves that are missing show as "-".
        folder: created if need be.
        title: first line of the report.
        analysed: further folders whose gradient alignments are shown.

    Returns:
        Path of `report.md`.

    Raises:
        UserError: the results are not in the layout of `promot_jax.results.schema`.
    """
    results = as_comparison(results)
    folder = Path(folder)
    shares = tables.format_shares(results)
    parts = [f"# {escape(title)}", _header(results), "## Scores", _scores(tables.scores(results))]
    parts += ["## At matched target score", *_matched(results)]
    parts += _sections(results)
    if shares.rows:
        parts += ["## Format share per task (%)", markdown_table(shares)]
    parts += ["## Figures", *_figures(results, folder)]
    if aligned := page.alignments(folder, *analysed):
        parts += ["## Gradient alignment", *_alignments(aligned, folder)]
    samples = _samples(results)
    if samples:
        parts += ["## Sample outputs", *samples]
    parts += ["## Settings", _settings(results)]
    page.write({"": results}, folder, title=title, analysed=analysed)
    return write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def write_tasks(
    by_task: Mapping[str, Json],
    folder: str | os.PathLike[str],
    reports: Mapping[str, Path],
    *,
    title: str = "ProMoT report",
    analysed: Sequence[Path] = (),
) -> Path:
    """Writes the `report.md` and `report.html` of several fine-tuning tasks together.

    Args:
        by_task: a comparison per task.
        folder: created if need be.
        reports: the `report.md` of each task (`write`), in `folder` or below it.
        title: first line of the report.
        analysed: further folders whose gradient alignments `report.html` shows.

    Returns:
        Path of `report.md`.

    Raises:
        UserError: the results are not in the layout of `promot_jax.results.schema`.
    """
    parts = [f"# {escape(title)}"]
    for task, results in by_task.items():
        results = as_comparison(results)
        link = quote(reports[task].relative_to(folder).as_posix())
        parts += [f"## {escape(task)}", f"[Figures, samples and settings]({link})", _scores(tables.scores(results))]
        parts += ["### At matched target score", *_matched(results)]
    page.write(by_task, folder, title=title, analysed=analysed)
    return write_text(Path(folder) / "report.md", "\n\n".join(parts) + "\n")


def _header(results: Json) -> str:
    """What was run: model, task, seeds, commit, versions."""
    runs = [run for members in results["methods"].values() for run in members]
    versions = [f"{name} {value}" for run in runs for name, value in (run.get("versions") or {}).items() if value]
    items = {
        "Model": [run.get("model") for run in runs],
        "Fine-tuned task": [run["target"]["task"] for run in runs if run.get("target")],
        "Seeds": sorted({run["seed"] for run in runs}),
        "Commit": [run.get("commit") for run in runs],
        "Versions": versions,
    }
    return "\n".join(f"- {name}: {_listed(values)}" for name, values in items.items())


def _settings(results: Json) -> str:
    """Methods side by side: a row per setting, with the value of each stage where they differ.

    What is off in every run is left out.
    """
    methods = results["methods"]
    rows = [["", *(escape(label(method)) for method in methods)]]
    rows.append(["seeds", *(_listed(run["seed"] for run in runs) for runs in methods.values())])
    rows.append(["seconds", *(_listed(_whole(run.get("seconds")) for run in runs) for runs in methods.values())])
    found: dict[str, dict[str, dict[str, list[Any]]]] = {}  # setting, method, stage
    for method, runs in methods.items():
        for run in runs:
            for key, value in (run.get("settings") or {}).items():
                stage = next((stage for stage in run["steps"] if key.startswith(f"{stage}/")), "")
                by_stage = found.setdefault(key.removeprefix(f"{stage}/"), {}).setdefault(method, {})
                by_stage.setdefault(stage, []).append(value)
    for name, by_method in found.items():
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
    return "\n\n".join([markdown_table(scores), "\n".join([*map(escape, scores.notes), tables.READING])])


def _sections(results: Json) -> list[str]:
    """What only a comparison over settings, seeds or exemplars has, and what is missing from it."""
    parts: list[str] = []
    if rows := tables.tried_settings(results):
        table = markdown([[escape(cell) for cell in row] for row in rows])
        parts += [f"## {tables.TRIED}", table, tables.tried_reading(results)]
    if spreads := tables.spreads(results):
        parts += [
            f"## {tables.SPREAD}",
            markdown([[escape(cell) for cell in row] for row in spreads]),
            tables.SPREAD_READING,
        ]
    if missing := tables.unfinished(results):
        parts += ["## Cells that are not here", "\n".join(f"- {escape(line)}" for line in missing)]
    return parts


def _matched(results: Json) -> list[str]:
    rows, notes = tables.matched(results)
    if not rows:
        return ["No method has a curve of target scores."]
    parts = [
        markdown([[escape(name), *numbers] for name, *numbers in rows]),
        " ".join([*map(escape, notes), tables.MATCHED]),
    ]
    if any(run.get("matched") for runs in results["methods"].values() for run in runs):
        parts += ["All tasks, at those checkpoints:", _scores(tables.scores(results, key="matched"))]
    return parts


def _figures(results: Json, folder: Path) -> list[str]:
    images = _images(figures.charts(results), folder)
    if not images:
        return ["No run has a curve."]
    return ["Lines: mean over seeds. Bands: range over seeds. Scores of the validation split.", *images]


def _alignments(aligned: Sequence[Json], folder: Path) -> list[str]:
    drawn = [figures.gradient_alignment(found) for found in aligned]
    named = [replace(one, name=f"{one.name}_{i}") for i, charts in enumerate(drawn) for one in charts]
    return [tables.aligned_reading(aligned), *_images(named, folder)]


def _images(drawn: Sequence[Chart], folder: Path) -> list[str]:
    pictures = figures.write(drawn, folder / "figures")
    return [f"### {escape(one.title)}\n\n![{escape(one.alt)}](figures/{one.path.name})" for one in pictures]


def _samples(results: Json) -> list[str]:
    """The first samples of each task, method beside method, of the lowest seed that has any."""
    methods = tables.ordered(results["methods"])
    with_samples = {m: [run for run in results["methods"][m] if run.get("samples")] for m in methods}
    seeds = [run["seed"] for runs in with_samples.values() for run in runs]
    if not seeds:
        return []
    outputs: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for method, runs in with_samples.items():
        for sample in (sample for run in runs if run["seed"] == min(seeds) for sample in run["samples"]):
            key = (sample["task"], str(sample.get("shots", "")), sample["input"], sample["target"])
            outputs.setdefault(key, {})[method] = sample["output"]
    shown = [method for method in methods if with_samples[method]]
    rows = [["task", "input", "target", *(escape(label(method)) for method in shown)]]
    counts: dict[tuple[str, str], int] = {}
    for (task, shots, source, target), by_method in sorted(outputs.items(), key=lambda item: item[0][:2]):
        counts[task, shots] = counts.get((task, shots), 0) + 1
        if counts[task, shots] <= SAMPLES_PER_TASK:
            name = escape(task + (f" ({shots}-shot)" if shots else ""))
            cells = [code(_start(by_method[method])) if method in by_method else tables.ABSENT for method in shown]
            rows.append([name, code(_end(source)), code(_start(target)), *cells])
    return [f"Seed {min(seeds)}; what the models wrote, as it is, apart from length.", markdown(rows)]


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
