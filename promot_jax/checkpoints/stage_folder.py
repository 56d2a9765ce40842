"""A finished stage's folder: its record `stage.json`, and its trained leaves laid over a base model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promot_jax import files, trees
from promot_jax.checkpoints.orbax import Saved
from promot_jax.errors import UserError

if TYPE_CHECKING:
    pass


STAGE_FILE = "stage.json"


def record(folder: Path, description: dict[str, Any]) -> None:
    """Marks a stage's folder as finished: what `load` and the next stage go by."""
    files.write(description, folder / STAGE_FILE)


def describe(folder: Path) -> dict[str, Any] | None:
    """Reads what `record` wrote, or None while the stage is not finished.

    Raises:
        UserError: the file is not one of ours.
    """
    try:
        description = json.loads((folder / STAGE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):  # `load` also asks about a .gguf file
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / STAGE_FILE} is not readable ({str(error)[:200]}); delete it to run the stage again."
        ) from error
    kinds: dict[str, Any] = {
        "stage": str,
        "trains": (list, str),
        "checkpoint": str,
        "base": str,
        "best_step": int,
        "curve": list,
    }
    if not isinstance(description, dict) or not all(
        isinstance(description.get(key), kind) and not isinstance(description[key], bool) for key, kind in kinds.items()
    ):
        raise UserError(f"{folder / STAGE_FILE} does not describe a stage; delete it to run the stage again.")
    return description


def overlay(folder: Path, step: int, params: trees.Tree, *, some: bool = False) -> trees.Tree:
    """Returns the parameters with those that a stage trained taken from one of its checkpoints.

    With `some` it may have trained others too: a prompt, in joint tuning, beside the model that is asked for.
    """
    checkpoints = Saved(folder / "checkpoints")
    saved = checkpoints.shapes(step)
    trained, frozen = trees.partition(params, lambda name: name in saved)
    return trees.merge(checkpoints.parameters(step, trained, some=some), frozen)
