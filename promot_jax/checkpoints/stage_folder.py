"""A finished stage's folder: its record `stage.json`, and its trained leaves laid over a base model."""

from pathlib import Path

from promot_jax import files, trees
from promot_jax.checkpoints.orbax import Saved
from promot_jax.results import records
from promot_jax.results.schema import StageRecord

STAGE_FILE = "stage.json"


def record(folder: Path, stage: StageRecord) -> None:
    """Marks a stage's folder as finished: what `load` and the next stage go by."""
    files.write(stage, folder / STAGE_FILE)


def describe(folder: Path) -> StageRecord | None:
    """Reads what `record` wrote, or None while the stage is not finished.

    Raises:
        UserError: the file is not one of ours.
    """
    try:
        return records.read(folder / STAGE_FILE, StageRecord, "delete it to run the stage again")
    except records.MissingError:  # `load` also asks about a .gguf file
        return None


def overlay(folder: Path, step: int, params: trees.Tree, *, some: bool = False) -> trees.Tree:
    """Returns the parameters with those that a stage trained taken from one of its checkpoints.

    With `some` it may have trained others too: a prompt, in joint tuning, beside the model that is asked for.
    """
    stage = describe(folder)  # None of one that still trains
    checkpoints = Saved(folder / "checkpoints", stage.run if stage else "")
    saved = checkpoints.shapes(step)
    trained, frozen = trees.partition(params, lambda name: name in saved)
    return trees.merge(checkpoints.parameters(step, trained, some=some), frozen)
