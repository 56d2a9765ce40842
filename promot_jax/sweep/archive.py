"""Finished cells in a small form that a repository can hold, so that nobody has to run them again.

A cell keeps its place: `<task>/<method>/<settings>/seed_<seed>/`, with its `results.json`, less the outputs that
reports show, and its `settings.json`. Models and prompts are not kept.
"""

from collections.abc import Iterable
from pathlib import Path

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.results import records, schema
from promot_jax.results.records import replace
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.status import finished

SETTINGS = "settings.json"


def restore(grid: Grid, archive: Path, cells: Iterable[Cell]) -> None:
    """Gives cells that are not finished the results that the archive has of them, on the host that writes.

    Whether they were run with the settings at hand is checked by whoever takes a cell up, as for every finished cell.
    """
    for cell in cells if hosts.is_writer() else ():
        kept = _place(grid, archive, cell)
        if not finished(cell) and (kept / "results.json").is_file():
            files.write(records.load(kept / SETTINGS), cell.folder / SETTINGS)
            files.write(schema.read_run(kept), cell.folder / "results.json")


def keep(grid: Grid, archive: Path, cells: Iterable[Cell]) -> None:
    """Writes finished cells that the archive lacks, on the host that writes."""
    for cell in cells if hosts.is_writer() else ():
        kept = _place(grid, archive, cell)
        if finished(cell) and not (kept / "results.json").is_file():
            files.write(records.load(cell.folder / SETTINGS), kept / SETTINGS)
            files.write(replace(schema.read_run(cell.folder), samples=[]), kept / "results.json")


def _place(grid: Grid, archive: Path, cell: Cell) -> Path:
    return archive / cell.folder.relative_to(grid.workdir)
