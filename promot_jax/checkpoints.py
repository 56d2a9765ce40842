"""Checkpoints of a stage through Orbax: save, resume, keep the best, hand over to the next stage."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from promot_jax import trees
from promot_jax.errors import UserError

State = dict[str, Any]

# Any folder `9/` counts as a step to Orbax; a finished checkpoint has this file.
_FINISHED = "_CHECKPOINT_METADATA"


class Checkpoints:
    """The checkpoints of one stage: trained leaves, optimizer state, step, and the curve so far.

    Keeps the newest (to resume from) and the best (to hand over). A save is visible only when it is complete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens `folder`, making it if needed."""
        self.folder = Path(folder).absolute()
        for path in self.folder.glob("*"):
            if path.name.isdigit() and path.is_dir() and not (path / _FINISHED).is_file():
                # Left by a kill while Orbax deleted it. Orbax would refuse to write this step, or keep it for good.
                shutil.rmtree(path)
        keep = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(
                    [keep.LatestN(1), keep.BestN(get_metric_fn=_score, n=1, reverse=False)]
                ),
                best_fn=_score,  # without it the scores are not written, and a resumed run knows none of them
                create=True,
            ),
        )

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        steps = [step for step in self._manager.all_steps() if (self.folder / str(step) / _FINISHED).is_file()]
        return max(steps, default=None)

    def save(self, step: int, state: State, progress: State, score: float) -> None:
        """Saves in the background.

        Args:
            step: updates done.
            state: device arrays: `{"params": trained leaves, "optimizer": ..., "step": ...}`.
            progress: JSON: the curve, seconds and the best step so far.
            score: target score in [0, 100]; the best one is kept. A checkpoint that may not be chosen has -1.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave(copy.deepcopy(progress)),  # written later: the caller's curve grows on
            ),
            metrics={"score": score},
            force=True,
        )

    def restore(self, step: int, like: State) -> tuple[State, State]:
        """Reads a checkpoint back onto the shapes, dtypes and shardings of `like`.

        Returns:
            The state and the progress.

        Raises:
            UserError: the checkpoint belongs to another model or optimizer.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        self._check(step, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The checkpoint {self.folder}/{step} does not fit this run ({_first_line(error)}); give another "
                "--workdir, or delete the folder to start again."
            ) from error
        return restored["state"], restored["progress"]

    def parameters(self, step: int, like: trees.Tree) -> trees.Tree:
        """Reads only the trained parameters of a checkpoint."""
        self._check(step, {"params": like})
        item = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)}
        handler = ocp.PyTreeCheckpointHandler()  # a checkpointer would miss, aloud, the metadata that lie one folder up
        try:
            restored = handler.restore(
                self.folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
                ),
            )
        finally:
            handler.close()
        return restored["params"]

    def _check(self, step: int, like: State) -> None:
        """Orbax casts dtypes and skips missing leaves in silence, so shapes are compared first."""
        saved = self.shapes(step)
        for path, leaf in trees.flatten(like["params"]).items():
            if saved.get(path) != tuple(leaf.shape):
                raise UserError(
                    f"The checkpoint {self.folder}/{step} holds {path} as {saved.get(path, 'nothing')}, this run has "
                    f"{tuple(leaf.shape)}; give another --workdir, or delete the folder to start again."
                )
        extra = set(saved) - set(trees.flatten(like["params"]))
        if extra:
            raise UserError(f"The checkpoint {self.folder}/{step} also trains {min(extra)}, which this run does not.")

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters in a checkpoint, by path.

        Raises:
            UserError: there is no such checkpoint, or a part of it is missing.
        """
        handler = ocp.PyTreeCheckpointHandler()
        try:
            tree = handler.metadata(self.folder / str(step) / "state").tree
        except FileNotFoundError as error:
            raise UserError(
                f"The checkpoint {self.folder}/{step} is gone; put it back, or delete the run's folder to start again."
            ) from error
        finally:
            handler.close()
        return {path: tuple(leaf.shape) for path, leaf in trees.flatten(tree["params"]).items()}

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
