"""Checkpoints of a stage through Orbax: save, resume, keep the best, hand over to the next stage.

Of several hosts all call everything here together; each writes and reads the parts that its devices hold.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from promot_jax import trees
from promot_jax.checkpoints.placement import aligned
from promot_jax.distributed import hosts
from promot_jax.errors import UserError

State = dict[str, Any]

# Any folder `9/` counts as a step to Orbax; a finished checkpoint has this file.
_FINISHED = "_CHECKPOINT_METADATA"
# Arrays are cut into pieces of so many bytes, so that one that is read back is not held packed and unpacked as well.
_IN_CHUNKS = ocp.SaveArgs(chunk_byte_size=1 << 22)


class Saved:
    """The checkpoints of one stage as they lie in its folder: trained parameters are read, nothing is changed."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Takes a folder, which need not be there."""
        self.folder = Path(folder).absolute()

    def steps(self) -> list[int]:
        """The finished steps, in order."""
        finished = [path.parent.name for path in self.folder.glob(f"*/{_FINISHED}")]
        return sorted(int(name) for name in finished if name.isdigit())

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained parameters in a checkpoint, by path.

        Raises:
            UserError: there is no such checkpoint, or a part of it is missing.
        """
        with self._reading(step) as folder:
            described = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
            arrays = [entry for entry in described if not entry["value_metadata"]["skip_deserialize"]]
            names = [[one["key"] for one in entry["key_metadata"]] for entry in arrays]
            # Nothing else tells that this file is damaged, and what is missed here is taken from the base model.
            if strange := {keys[0] for keys in names} - {"params", "optimizer", "step"}:
                raise ValueError(f"it holds {min(strange)!r}")
            saved = ["/".join(keys[1:]) for keys in sorted(names) if keys[0] == "params"]
            return {path: tuple(_array(folder, f"params/{path}").shape) for path in saved}

    def parameters(self, step: int, like: trees.Tree, *, some: bool = False) -> trees.Tree:
        """Reads only the trained parameters of a checkpoint.

        Args:
            step: of the checkpoint.
            like: what it trained; of each leaf the shape, dtype and sharding count.
            some: whether it may have trained more than is asked for.
        """
        self._check(step, {"params": like}, some)
        found = {}
        for path, leaf in trees.flatten(like).items():
            with self._reading(step) as folder:
                store = _array(folder, f"params/{path}")
            if not np.can_cast(store.dtype.numpy_dtype, leaf.dtype):  # without loss, as bfloat16 to float32
                raise UserError(
                    f"The checkpoint {self.folder}/{step} holds {path} as {store.dtype.name}, this run as {leaf.dtype}."
                )
            with self._reading(step):
                part = functools.partial(_read, store, leaf.dtype)
                found[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
        return trees.unflatten(found)

    def _check(self, step: int, like: State, some: bool = False) -> None:
        """Orbax casts dtypes and skips missing leaves in silence, so shapes are compared first."""
        saved = self.shapes(step)
        for path, leaf in trees.flatten(like["params"]).items():
            if saved.get(path) != tuple(leaf.shape):
                raise UserError(
                    f"The checkpoint {self.folder}/{step} holds {path} as {saved.get(path, 'nothing')}, this run has "
                    f"{tuple(leaf.shape)}; give another --workdir, or delete the folder to start again."
                )
        extra = set(saved) - set(trees.flatten(like["params"]))
        if extra and not some:
            raise UserError(f"The checkpoint {self.folder}/{step} also trains {min(extra)}, which this run does not.")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        """The folder of a checkpoint's arrays; whatever goes wrong with them is one sentence."""
        try:
            yield self.folder / str(step) / "state"
        except FileNotFoundError as error:
            raise UserError(
                f"The checkpoint {self.folder}/{step} is gone; put it back, or delete the run's folder to start again."
            ) from error
        except Exception as error:  # whatever Orbax, tensorstore and what they read with make of a damaged file
            raise UserError(
                f"The checkpoint {self.folder}/{step} is damaged ({_first_line(error)}); put a copy of it back, or "
                "delete the run's folder to start again."
            ) from error


class Checkpoints(Saved):
    """The checkpoints of one stage: trained leaves, optimizer state, step, and the curve so far.

    Keeps the newest (to resume from), the best (to hand over), and one in every `keep_period` steps where an analysis
    asks for them. A save is visible only when it is complete.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_period: int = 0):
        """Opens `folder`, making it if needed.

        Args:
            folder: of the checkpoints.
            keep_period: steps between checkpoints that are kept for good; 0 keeps none.
        """
        super().__init__(folder)
        hosts.decide(self._tidy, "tidy checkpoints")
        keep = ocp.checkpoint_managers
        kept: list[ocp.checkpoint_managers.PreservationPolicy] = [
            keep.LatestN(1),
            keep.BestN(get_metric_fn=_score, n=1, reverse=False),
        ]
        if keep_period:
            kept.append(keep.EveryNSteps(keep_period))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(kept),
                best_fn=_score,  # without it the scores are not written, and a resumed run knows none of them
                create=True,
            ),
        )

    def _tidy(self) -> None:
        for path in self.folder.glob("*"):
            if path.name.isdigit() and path.is_dir() and not (path / _FINISHED).is_file():
                # Left by a kill while Orbax deleted it. Orbax would refuse to write this step, or keep it for good.
                shutil.rmtree(path)

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return hosts.decide(lambda: max(self.steps(), default=None), "the newest checkpoint")

    def save(self, step: int, state: State, progress: State, score: float) -> None:
        """Saves in the background.

        Args:
            step: updates done.
            state: device arrays: `{"params": trained leaves, "optimizer": ..., "step": ...}`.
            progress: JSON: the curve, the losses since its last point, and seconds so far.
            score: target score in [0, 100]; the best one is kept. A checkpoint that may not be chosen has -1.
        """
        hosts.barrier("a save")  # a host that is stuck gets a name here, before Orbax waits for it
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=jax.tree.map(lambda _: _IN_CHUNKS, state)),
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

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        hosts.barrier("the end of a save")
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()

    def remove(self) -> None:
        """Deletes the folder."""
        self.close()
        if hosts.is_writer():
            shutil.rmtree(self.folder)


def existing(folder: Path) -> Checkpoints | None:
    """Opens a folder of checkpoints if it is there; None otherwise."""
    return Checkpoints(folder) if hosts.decide(folder.is_dir, "a folder of checkpoints") else None


def _array(folder: Path, path: str) -> Any:
    """Opens an array as Orbax has written it; its own reader would hold a leaf three times."""
    import tensorstore as ts

    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{path.replace('/', '.')}/"}
    spec = {"driver": "zarr", "kvstore": place}
    return ts.open(spec, open=True, read=True, context=_context()).result()


@functools.cache
def _context() -> Any:
    """One thread at a time: each that tensorstore ever used keeps room for a chunk."""
    import tensorstore as ts

    return ts.Context({"file_io_concurrency": {"limit": 1}, "data_copy_concurrency": {"limit": 1}})


def _read(store: Any, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A part of an array in a dtype that holds its values, a chunk at a time."""
    box = [one.indices(size)[:2] for one, size in zip(index, store.shape, strict=True)]
    out = aligned(tuple(last - first for first, last in box), np.dtype(dtype))
    steps = store.chunk_layout.read_chunk.shape
    grid = [range(first - first % step, last, step) for (first, last), step in zip(box, steps, strict=True)]
    for corner in itertools.product(*grid):
        part = [(max(a, at), min(b, at + n)) for (a, b), at, n in zip(box, corner, steps, strict=True)]
        values = store[tuple(slice(*one) for one in part)].read().result()
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite numbers")
        out[tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(part, box, strict=True))] = values
    return out


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
