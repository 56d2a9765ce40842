"""The page's tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from promot_jax.methods import labels
from promot_jax.report import figures, svg, tables
from promot_jax.report.html import Markup, join, tag
from promot_jax.report.svg import Chart

Json = dict[str, Any]

MORE_READING = "Green is better. ICL tasks are asked without a prompt, the target behind the method's own."


def header(title: str, tasks: Mapping[str, Json], aligned: bool) -> Markup:
    """Title, what was run, and where to go."""
    runs = [run for one in tasks.values() for members in one["methods"].values() for run in members]
    facts = {
        "Model": [run.get("model") for run in runs],
        "Fine-tuned on": [run["target"]["task"] for run in runs if run.get("target")] or list(tasks),
        "Methods": [labels.label(method) for one in tasks.values() for method in one["methods"]],
        "Seeds": sorted({run["seed"] for run in runs}),
        "Commit": [_short(run["commit"]) for run in runs if run.get("commit")],
    }
    listed = {name: ", ".join(dict.fromkeys(map(str, filter(_known, values)))) for name, values in facts.items()}
    items = [tag("div", tag("dt", name), tag("dd", value or tables.ABSENT)) for name, value in listed.items()]
    links = [(f"task-{index}", name or "Scores") for index, name in enumerate(tasks)]
    links += [("alignment", "Gradients")] * aligned + [("samples", "Samples"), ("runs", "Runs")]
    nav = tag("nav", *(tag("a", name, href=f"#{place}") for place, name in links), aria_label="Sections")
    button = tag("button", "Theme", id="theme", type="button", hidden=True, aria_label="Light or dark theme")
    return tag("header", tag("div", tag("h1", title), button, class_="top"), tag("dl", *items, class_="facts"), nav)


def _known(value: Any) -> bool:
    return value is not None and value != ""


def _short(commit: str) -> str:
    """A commit's first twelve digits, with what may stand behind them (`-dirty`)."""
    digits, dash, rest = commit.partition("-")
    return digits[:12] + dash + rest


def section(place: str, title: str, *children: Any) -> Markup:
    """A part of the page with its heading."""
    return tag("section", tag("h2", title, id=f"{place}-title"), *children, id=place, aria_labelledby=f"{place}-title")


def task(name: str, results: Json, index: int, several: bool) -> Markup:
    """All tables and figures of one fine-tuned task."""
    drawn = figures.charts(results)
    shares, rows = tables.format_shares(results), tables.matched(results)
    parts: list[Any] = [progress(results.get("cells") or [])]
    lead = [_overview(results)]
    if rows[0]:
        stacked = [rows[0][0], *([name, *map(_stacked, rest)] for name, *rest in rows[0][1:])]
        lead += [_plain(stacked, "At matched target score: validation split")]
        lead += [tag("p", " ".join(rows[1]), class_="note")]
    parts.append(tag("div", tag("div", *lead), *map(figure, drawn[:1]), class_="lead"))
    parts += [tag("h3", "Every task"), _scores(tables.scores(results), "Test split, best checkpoint of each run")]
    if any(run.get("matched") for members in results["methods"].values() for run in members):
        parts.append(tag("h3", "Every task at matched target score"))
        parts.append(_scores(tables.scores(results, key="matched"), "Validation split, at those checkpoints"))
    for title, more, told in (
        (tables.TRIED, tables.tried_settings(results), tables.tried_reading(results)),
        (tables.SPREAD, tables.spreads(results), tables.SPREAD_READING),
    ):
        parts += [tag("h3", title), _plain(more, told)] if more else []
    if shares.rows:
        caption = "Outputs in the fine-tuned task's label set (%), test split"
        parts += [tag("h3", "Format share of every task"), _scores(shares, caption, less_is_better=True)]
    if drawn[1:]:
        parts += [tag("h3", "Curves"), tag("p", "Lines: mean over seeds; bands: their range. Validation split.")]
        parts.append(tag("div", *map(figure, drawn[1:]), class_="figures"))
    title = f"Fine-tuned on {name}" if several and name else "Scores"
    return section(f"task-{index}", title, *parts)


def progress(cells: Sequence[Json]) -> Markup | None:
    """How many cells of a comparison are there, and which are not; nothing where all are."""
    missing = [cell for cell in cells if cell.get("state") != "finished"]
    if not missing:
        return None
    names = ("method", "seed", "varied", "state", "message")
    rows = [[_words(cell.get(name)) for name in names] for cell in missing]
    done = len(cells) - len(missing)
    running = sum(cell.get("state") == "running" for cell in missing)
    bar = tag("progress", value=done, max=len(cells), aria_label="Finished cells")
    told = tag("p", bar, f" {done} of {len(cells)} cells are finished" + f", {running} running" * bool(running) + ".")
    table = _plain([list(names), *rows], "Cells that are not")
    return tag("div", told, tag("details", tag("summary", "What is missing"), table), class_="progress")


def alignments(found: Sequence[Json]) -> Markup | None:
    """Gradient alignment, a group of figures per run."""
    if not found:
        return None
    drawn = [figure(chart) for one in found for chart in figures.gradient_alignment(one)]
    note = tables.aligned_reading(found)
    return section("alignment", "Gradient alignment", tag("p", note), tag("div", *drawn, class_="figures"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def scroll(table: Markup, name: str) -> Markup:
    """A table that scrolls sideways on its own where the page is too narrow."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def grid(rows: Iterable[Sequence[Any]], head: Sequence[Any], name: str) -> Markup:
    """A table of cells under one header line; the first cell of a row is its header."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    return scroll(tag("table", tag("caption", name), tag("thead", top), tag("tbody", *body)), name)


def _plain(rows: Sequence[Sequence[Any]], name: str) -> Markup:
    return grid(rows[1:], rows[0], name)


def _overview(results: Json) -> Markup:
    """Methods down, averages across: what to look at first."""
    scores = tables.scores(results)
    rows = [row for row in scores.rows if row.label.endswith("target)") or row.label in tables.AVERAGES]
    columns = [(row, shots) for row in rows for shots in dict.fromkeys(key[1] for key in row.cells)]
    head = ["", *(f"{row.label}{f', {shots}-shot' if shots else ''}" for row, shots in columns)]
    lines = []
    for method in scores.methods:
        cells = [_cell(row.cells.get((method, shots)), _worse(row.label)) for row, shots in columns]
        lines.append([labels.label(method), *cells])
    return grid(lines, head, "Overview: test split, differences to pretrained")


def _scores(scores: tables.Table, name: str, *, less_is_better: bool = False) -> Markup:
    """The paper's layout: tasks down, methods and shots across."""
    if not scores.rows:
        return tag("p", "No scores.")
    columns = scores.columns(scores.methods)
    per = max(1, len(scores.shots))
    heads = [tag("th", labels.label(method), scope="colgroup", colspan=per) for method in scores.methods]
    lines = [tag("tr", tag("td"), *heads)]
    if scores.shots:
        shots = [tag("th", f"{count}-shot", scope="col") for _, count in columns]
        lines.append(tag("tr", tag("td"), *shots))
    body = []
    for row in scores.rows:
        cells: list[Markup] = []
        worse = less_is_better or _worse(row.label)
        for method in scores.methods:
            single = row.cells.get((method, None))
            if single is not None:
                cells.append(tag("td", _cell(single, worse), colspan=per))
            else:
                kept = [row.cells.get(column) for column in columns if column[0] == method]
                cells += [tag("td", _cell(cell, worse)) for cell in kept]
        heavy = "sum" if row.label in tables.AVERAGES or row.label.endswith("target)") else None
        body.append(tag("tr", tag("th", row.label, scope="row"), *cells, class_=heavy))
    table = tag("table", tag("caption", name), tag("thead", *lines), tag("tbody", *body))
    notes = [tag("p", note, class_="note") for note in scores.notes]
    return join(scroll(table, name), *notes)


def _worse(label: str) -> bool:
    return label == tables.AVERAGES[1]


def _cell(cell: tables.Cell | None, less_is_better: bool) -> Markup | str:
    """Score, change and interval; the sign tells what the colour does."""
    if cell is None:
        return tables.ABSENT
    change = None
    if cell.change is not None:
        rounded = round(cell.change, 1)
        good = rounded < 0 if less_is_better else rounded > 0
        change = tag("span", tables.signed(cell.change), class_="same" if not rounded else "up" if good else "down")
    interval = tag("span", cell.interval(), class_="interval") if cell.interval() else None
    return join(tag("span", f"{cell.value:.1f}", class_="score"), " ", change, interval)


def _stacked(text: str) -> Markup:
    """`87.7 [81.0, 91.0]` with the interval on a line of its own."""
    score, bracket, rest = text.partition(" [")
    return join(score, tag("span", f"[{rest}", class_="interval") if bracket else None)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "" if value is None else str(value)


# ---- figures ---------------------------------------------------------------------------------------------------------


def figure(chart: Chart, *, small: bool = False) -> Markup:
    """A chart with its legend, and its values as a table for those who cannot see or hover."""
    entries = [
        tag(
            "li",
            tag("svg", svg.swatch(line), viewBox="0 0 26 14", class_="chart", aria_hidden="true"),
            line.label,
            data_style=line.style,
        )
        for line in svg.legend(chart)
    ]
    plots = tag("div", *svg.plots(chart), class_="panels")
    rows = [
        [panel.title or chart.title, line.label or "single seed", point.tip]
        for panel in chart.panels
        for line in panel.lines
        for point in line.points
    ]
    values = tag("details", tag("summary", "Values"), grid(rows, ["plot", "line", "value"], f"Values: {chart.title}"))
    wide = "wide" if len(chart.panels) > 1 else None
    parts = [plots, tag("ul", *entries, class_="legend")]
    if not small:
        parts = [tag("figcaption", tag("strong", chart.title)), *parts, values]
    return tag("figure", *parts, class_=wide, data_chart=chart.name, aria_label=chart.alt)
