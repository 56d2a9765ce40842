"""The state of a cell as its folder tells it: finished, failed, running, or not begun."""

import dataclasses
import hashlib
import time

from promot_jax import files
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.results import records
from promot_jax.results.schema import CellState, Failure
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.leases import owner

FAILED = "failed.json"


def finished(cell: Cell) -> bool:
    """Whether a cell has its results."""
    return (cell.folder / "results.json").is_file()


def failure(grid: Grid, cell: Cell) -> Failure | None:
    """How a cell failed with these settings, or None."""
    try:
        found = records.read(cell.folder / FAILED, Failure)
    except UserError:  # none, or half of one of before
        return None
    return found if found.settings == _digest(grid, cell) and not finished(cell) else None


def write_failure(grid: Grid, cell: Cell, message: str, lasting: bool) -> None:
    """Writes down how a cell failed, for `failure`."""
    time_now = time.strftime("%Y-%m-%d %H:%M:%S")
    failed = Failure(message=message, lasting=lasting, settings=_digest(grid, cell), time=time_now)
    files.write(failed, cell.folder / FAILED)


def _digest(grid: Grid, cell: Cell) -> str:
    """Tells whether a failure belongs to the settings at hand."""
    experiment = dataclasses.replace(grid.experiment_of(cell), partitioner=Partitioner())  # the mesh changes no result
    settings = repr((experiment, grid.tuning_of(cell), cell.method))
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def state(grid: Grid, cell: Cell, stale: float) -> CellState:
    """What a report says of a cell."""
    failed = failure(grid, cell)
    state = "finished" if finished(cell) else "failed" if failed else "missing"
    if state == "missing" and owner(cell.folder, stale):
        state = "running"
    return CellState(
        method=cell.label,
        seed=cell.seed,
        varied=dict(cell.varied),
        folder=cell.folder.relative_to(grid.workdir).as_posix(),
        state=state,
        message=failed.message if failed else "",
    )
