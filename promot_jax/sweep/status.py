"""The state of a cell as its folder tells it: finished, failed, running, or not begun."""

import dataclasses
import hashlib
import json
import time
from typing import Any

from promot_jax import files
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.leases import owner

Json = dict[str, Any]

FAILED = "failed.json"


def finished(cell: Cell) -> bool:
    """Whether a cell has its results."""
    return (cell.folder / "results.json").is_file()


def failure(grid: Grid, cell: Cell) -> Json | None:
    """How a cell failed with these settings (`message`; `lasting` where it would fail again), or None."""
    try:
        found = json.loads((cell.folder / FAILED).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(found, dict) and found.keys() >= {"message", "lasting", "settings"}
    return found if whole and found["settings"] == _digest(grid, cell) and not finished(cell) else None


def write_failure(grid: Grid, cell: Cell, message: str, lasting: bool) -> None:
    """Writes down how a cell failed, for `failure`."""
    found = {"message": message, "lasting": lasting, "settings": _digest(grid, cell)}
    files.write(found | {"time": time.strftime("%Y-%m-%d %H:%M:%S")}, cell.folder / FAILED)


def _digest(grid: Grid, cell: Cell) -> str:
    """Tells whether a failure belongs to the settings at hand."""
    experiment = dataclasses.replace(grid.experiment_of(cell), partitioner=Partitioner())  # the mesh changes no result
    settings = repr((experiment, grid.tuning_of(cell), cell.method))
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def state(grid: Grid, cell: Cell, stale: float) -> Json:
    """What a report says of a cell: its settings and "finished", "failed", "running" or "missing"."""
    failed = failure(grid, cell)
    state: Json = {"method": cell.label, "seed": cell.seed, "varied": dict(cell.varied)}
    state["folder"] = cell.folder.relative_to(grid.workdir).as_posix()
    state["state"] = "finished" if finished(cell) else "failed" if failed else "missing"
    if state["state"] == "missing" and owner(cell.folder, stale):
        state["state"] = "running"
    return state | ({"message": failed["message"]} if failed else {})
