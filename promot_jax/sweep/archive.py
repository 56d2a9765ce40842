"""Finished cells in a small form that a repository can hold, so that nobody has to run them again.

A cell keeps its place, `<task>/<method>/<settings>/seed_<seed>.json.gz`: one JSON object with its settings (`settings`)
and its results (`run`), less the outputs that reports show. Models and prompts are not kept.
"""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.results import records, schema
from promot_jax.results.records import replace
from promot_jax.results.schema import Run
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.status import finished

SETTINGS = "settings.json"
_ADVICE = "restore it from the repository, or delete it, and the cell is run again"


class Archived(records.Record, frozen=True, kw_only=True):
    """A finished cell."""

    settings: dict[str, Any]  # that it was started with
    run: Run


def restore(grid: Grid, archive: Path, cells: Iterable[Cell]) -> None:
    """Gives cells that are not finished the results that the archive has of them, on the host that writes.

    Whether they were run with the settings at hand is checked by whoever takes a cell up, as for every finished cell.

    Raises:
        UserError: a file in the archive is damaged.
    """
    for cell in cells if hosts.is_writer() else ():
        path = _place(grid, archive, cell)
        if not finished(cell) and path.is_file():
            kept = records.read(path, Archived, _ADVICE)
            files.write(kept.settings, cell.folder / SETTINGS)
            files.write(kept.run, cell.folder / "results.json")


def keep(grid: Grid, archive: Path, cells: Iterable[Cell]) -> None:
    """Writes finished cells that the archive lacks, on the host that writes."""
    for cell in cells if hosts.is_writer() else ():
        path = _place(grid, archive, cell)
        if finished(cell) and not path.is_file():
            run = replace(schema.read_run(cell.folder), samples=[])
            archived = Archived(settings=records.load(cell.folder / SETTINGS), run=run)
            with files.replacing(path) as made:
                made.write_bytes(gzip.compress(json.dumps(files.plain(archived)).encode(), mtime=0))


def _place(grid: Grid, archive: Path, cell: Cell) -> Path:
    return (archive / cell.folder.relative_to(grid.workdir)).with_suffix(".json.gz")
