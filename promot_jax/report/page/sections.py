"""What the page shows of each fine-tuned task, as the templates `page.html` and `task.html` take it."""

from collections.abc import Sequence
from typing import Any

from promot_jax.report import blocks, figures, tables
from promot_jax.report.svg import Chart
from promot_jax.results.schema import CellState, Comparison

Rows = Sequence[Sequence[Any]]  # of a table, the header first


def task(name: str, comparison: Comparison, index: int, several: bool) -> dict[str, Any]:
    """All tables and figures of one fine-tuned task, the `index`-th of the page."""
    scores = tables.scores(comparison)
    columns = [(row, shots) for row in scores.rows if row.summary for shots in dict.fromkeys(s for _, s in row.cells)]
    return {
        "id": f"task-{index}",
        "name": name,
        "title": f"Fine-tuned on {name}" if several and name else "Scores",
        "cells": _cells(comparison.cells),
        "overview": {"methods": scores.methods, "columns": columns},
        "first": figures.first(comparison),
        "leading": blocks.leading(comparison),
        "blocks": [*blocks.further(comparison), *blocks.wide(comparison)],
        "scores": scores,
        "matched_scores": tables.at_matched_score(comparison),
        "format_shares": tables.format_shares(comparison),
        "charts": figures.charts(comparison),
    }


def _cells(cells: Sequence[CellState]) -> dict[str, Any]:
    """How many cells of a sweep there are, are finished and run, and a table of those that are not finished."""
    states = [cell.state for cell in cells]
    rows = [
        [cell.method, cell.seed, ", ".join(f"{k} {v}" for k, v in cell.varied.items()), cell.state, cell.message]
        for cell in cells
        if cell.state != "finished"
    ]
    counts = {"total": len(cells), "finished": states.count("finished"), "running": states.count("running")}
    return counts | {"unfinished": [["method", "seed", "varied", "state", "message"], *rows] if rows else []}


def values(chart: Chart) -> Rows:
    """What a chart shows, as a table."""
    lines = [(panel.title or chart.title, line) for panel in chart.panels for line in panel.lines]
    rows = [[title, line.label or "single points", point.tip] for title, line in lines for point in line.points]
    return [["plot", "line", "value"], *rows]
