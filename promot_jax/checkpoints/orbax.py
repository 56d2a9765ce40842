"""Checkpoints of a stage through Orbax: save, resume, keep the best, hand over to the next stage.

All hosts call everything here together; each writes and reads the parts on its devices. With each checkpoint stand its
step, a digest of the run's settings and a checksum of every leaf, which are compared whenever it is read: neither Orbax
nor the files notice a flipped bit, a folder of another name, or another run's. A checksum reads a leaf once, on the
devices: of a state of 100 GB on 64 chips that is a few milliseconds, beside the seconds that writing it takes.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from promot_jax import trees
from promot_jax.checkpoints.placement import aligned
from promot_jax.checkpoints.remote_files import reason
from promot_jax.distributed import hosts
from promot_jax.errors import StorageError, UserError
from promot_jax.params.checksum import checksum

State = dict[str, Any]
# Whatever Orbax logs as an error, with the traceback of each of its threads, it raises too.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "/orbax/" not in record.pathname)

# Orbax takes any folder `9/` for a step; a finished checkpoint has this file.
_FINISHED = "_CHECKPOINT_METADATA"
# Bytes of a chunk of an array: reading decompresses one chunk at a time, not a second copy of the array.
_IN_CHUNKS = ocp.SaveArgs(chunk_byte_size=1 << 22)


class Saved:
    """The checkpoints in a stage's folder, read only: steps and trained parameters."""

    def __init__(self, folder: str | os.PathLike[str], run: str = ""):
        """Takes a folder, which need not exist, and the digest of its run's settings; "" accepts any run's."""
        self.folder, self._run = Path(folder).absolute(), run

    def steps(self) -> list[int]:
        """The finished steps, in order."""
        names = (path.parent.name for path in self.folder.glob(f"*/{_FINISHED}"))
        return sorted(int(name) for name in names if name.isdigit())

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a checkpoint's trained parameters, by path; raises UserError if it is missing or damaged."""
        with self._reading(step) as folder:
            entries = json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()
            arrays = [entry for entry in entries if not entry["value_metadata"]["skip_deserialize"]]
            keys = sorted([key["key"] for key in entry["key_metadata"]] for entry in arrays)
            # The only check of this file; a leaf that is missed here would be taken from the base model.
            if unknown := {first for first, *_ in keys} - {"params", "optimizer", "step"}:
                raise ValueError(f"it holds {min(unknown)!r}")
            paths = ["/".join(rest) for first, *rest in keys if first == "params"]
            return {path: tuple(_array(folder, f"params/{path}").shape) for path in paths}

    def parameters(self, step: int, like: trees.Tree, *, some: bool = False) -> trees.Tree:
        """Reads only the trained parameters of a checkpoint.

        Args:
            step: of the checkpoint.
            like: the trained parameters: shape, dtype and sharding of each leaf.
            some: whether the checkpoint may have trained more than `like`.
        """
        self._check(step, like, some)
        params, origin = {}, self._origin(step)
        for path, leaf in trees.flatten(like).items():
            with self._reading(step) as folder:
                store = _array(folder, f"params/{path}")
            if not np.can_cast(store.dtype.numpy_dtype, leaf.dtype):  # without loss, as bfloat16 to float32
                raise UserError(
                    f"The checkpoint {self.folder}/{step} holds {path} as {store.dtype.name}, this run as {leaf.dtype}."
                )
            with self._reading(step):
                part = functools.partial(_read, store, leaf.dtype)
                params[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
                origin.compare(path, params[path], store.dtype.numpy_dtype)
        return trees.unflatten(params)

    def _origin(self, step: int) -> "_Origin":
        """What was noted with a checkpoint, which has to be of this step and run."""
        with self._reading(step) as folder:
            noted = json.loads((folder.parent / "progress" / "metadata").read_text("utf-8")).get("origin", {})
            origin = _Origin(**noted)
            if origin.step not in (None, step):
                raise ValueError(f"it is that of step {origin.step}, under another name")
        if self._run and origin.run not in ("", self._run):
            raise UserError(
                f"The checkpoint {self.folder}/{step} is of a run with other settings; put the right one back, or "
                "delete the run's folder to start again."
            )
        return origin

    def _check(self, step: int, like: trees.Tree, some: bool = False) -> None:
        """Compares shapes, since Orbax casts dtypes and skips missing leaves silently."""
        saved, leaves = self.shapes(step), trees.flatten(like)
        for path, leaf in leaves.items():
            if saved.get(path) != tuple(leaf.shape):
                raise UserError(
                    f"The checkpoint {self.folder}/{step} holds {path} as {saved.get(path, 'nothing')}, this run has "
                    f"{tuple(leaf.shape)}; give another --workdir, or delete the folder to start again."
                )
        if (extra := saved.keys() - leaves.keys()) and not some:
            raise UserError(f"The checkpoint {self.folder}/{step} also trains {min(extra)}, which this run does not.")

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        """Yields the folder of a checkpoint's arrays; turns every error in them into a UserError."""
        try:
            yield self.folder / str(step) / "state"
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(
                f"The checkpoint {self.folder}/{step} is gone; put it back, or delete the run's folder to start again."
            ) from error
        except Exception as error:  # of any type that Orbax and tensorstore raise for a damaged file
            if hosts.is_of_devices(error):
                raise
            raise UserError(
                f"The checkpoint {self.folder}/{step} is damaged ({reason(error)}); put a copy of it back, or "
                "delete the run's folder to start again."
            ) from error


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What a checkpoint is of; those of earlier versions do not say."""

    step: int | None = None
    run: str = ""  # digest of the run's settings
    params: dict[str, int] = dataclasses.field(default_factory=dict)  # checksums by path
    others: list[int] = dataclasses.field(default_factory=list)  # of the optimizer's leaves and the step, in order

    @classmethod
    def of(cls, step: int, run: str, state: State) -> "_Origin":
        """What is noted with a state."""
        params = {path: checksum(leaf) for path, leaf in trees.flatten(state["params"]).items()}
        return cls(step, run, params, [checksum(leaf) for leaf in _others(state)])

    def compare(self, path: str, leaf: Any, dtype: Any = None) -> None:
        """Raises ValueError for a trained leaf that is not what was saved."""
        if self.params and self.params.get(path) != checksum(leaf, dtype):
            raise ValueError(f"the values of {path} are not those that were saved")


def _others(state: State) -> list[Any]:
    return jax.tree.leaves({name: tree for name, tree in state.items() if name != "params"})


class Checkpoints(Saved):
    """The checkpoints of one stage: trained leaves, optimizer state, step, and the curve so far.

    Keeps the newest (to resume from), the best (to hand over), and one in every `keep_period` steps (for analyses). A
    save is visible only when it is complete.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_period: int = 0, run: str = ""):
        """Opens `folder`, making it if needed; `keep_period` steps lie between checkpoints that stay, 0 for none."""
        super().__init__(folder, run)
        hosts.decide(self._tidy, "tidy checkpoints")
        keep, score = ocp.checkpoint_managers, operator.itemgetter("score")
        kept = [keep.LatestN(1), keep.BestN(get_metric_fn=score, n=1, reverse=False)]
        kept += [keep.EveryNSteps(keep_period)] if keep_period else []
        # Without `best_fn` the scores are not written, and a resumed run has none of them.
        policy = keep.AnyPreservationPolicy(kept)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=score, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _tidy(self) -> None:
        for path in self.folder.glob("*"):
            if path.name.isdigit() and path.is_dir() and not (path / _FINISHED).is_file():
                # Left by a kill while Orbax deleted it. Orbax would refuse to write this step, or keep it forever.
                shutil.rmtree(path)
        for step in self.steps():  # Orbax reads all scores when it opens a folder
            if (scores := self.folder / str(step) / "metrics" / "metrics").is_file():
                with self._reading(step):
                    float(json.loads(scores.read_text("utf-8"))["score"])

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return hosts.decide(lambda: max(self.steps(), default=None), "the newest checkpoint")

    def save(self, step: int, state: State, progress: State, score: float) -> None:
        """Saves in the background.

        Args:
            step: updates done.
            state: device arrays: `{"params": trained leaves, "optimizer": ..., "step": ...}`.
            progress: JSON: the curve, the losses since its last evaluation, and seconds so far.
            score: target score in [0, 100]; the best is kept. A checkpoint that may not be chosen has -1.
        """
        hosts.barrier("a save")  # names a host that is stuck, before Orbax waits for it
        origin = dataclasses.asdict(_Origin.of(step, self._run, state))
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=jax.tree.map(lambda _: _IN_CHUNKS, state)),
            # Written later, while the caller's curve grows.
            progress=ocp.args.JsonSave(copy.deepcopy(progress) | {"origin": origin}),
        )
        with self._writing():
            self._manager.save(step, args=arguments, metrics={"score": score}, force=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns every error of a save, which may be that of one before, into a StorageError."""
        try:
            yield
        except Exception as error:  # of any type that Orbax and tensorstore raise for a full disk or a missing folder
            if hosts.is_of_devices(error):
                raise
            found = error.strerror if isinstance(error, OSError) else re.search(r"([^:]+) \[os_error_code", str(error))
            why = found[1].strip() if isinstance(found, re.Match) else found or reason(error)
            raise StorageError(
                f"Cannot save a checkpoint in {self.folder} ({why}); make room there, or put the folder back: the same "
                "command resumes the run."
            ) from error

    def restore(self, step: int, like: State) -> tuple[State, State]:
        """Reads state and progress of a checkpoint, in the shapes, dtypes and shardings of `like`.

        Raises UserError if the checkpoint is damaged, or belongs to another model, optimizer or run.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        self._check(step, like["params"])
        origin = self._origin(step)
        with self._reading(step):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"The checkpoint {self.folder}/{step} does not fit this run ({reason(error)}); give another "
                    "--workdir, or delete the folder to start again."
                ) from error
            state, progress = restored["state"], restored["progress"]
            for path, leaf in trees.flatten(state["params"]).items():
                origin.compare(path, leaf)
            if origin.others and origin.others != [checksum(leaf) for leaf in _others(state)]:
                raise ValueError("the optimizer's values are not those that were saved")
            if origin.step is None and int(state["step"]) != step:
                raise ValueError(f"it is that of step {int(state['step'])}, under another name")
        progress.pop("origin", None)
        return state, progress

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        hosts.barrier("the end of a save")
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the folder."""
        with self._writing():
            self._manager.close()

    def remove(self) -> None:
        """Deletes the folder."""
        self.close()
        if hosts.is_writer():
            shutil.rmtree(self.folder)


def existing(folder: Path, run: str = "") -> Checkpoints | None:
    """Opens a folder of checkpoints if it exists; None otherwise."""
    return Checkpoints(folder, run=run) if hosts.decide(folder.is_dir, "a folder of checkpoints") else None


def _array(folder: Path, path: str) -> Any:
    """Opens an array that Orbax wrote; Orbax's own reader would need the memory of three copies."""
    import tensorstore as ts

    base = {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{path.replace('/', '.')}/"}
    return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=_context()).result()


@functools.cache
def _context() -> Any:
    """One thread at a time, since each that tensorstore ever used keeps the memory of a chunk."""
    import tensorstore as ts

    return ts.Context({"file_io_concurrency": {"limit": 1}, "data_copy_concurrency": {"limit": 1}})


def _read(store: Any, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of an array, in a dtype that holds its values."""
    import tensorstore as ts

    part = store[index][ts.d[:].translate_to[0]] if index else store
    out = aligned(part.shape, np.dtype(dtype))
    ts.array(out, context=_context(), copy=False).write(part).result()  # chunk by chunk
    with np.errstate(invalid="ignore"):
        if not np.isfinite([out.min(), out.max()]).all():  # without the memory of a mask
            raise ValueError("it holds values that are not finite numbers")
    return out
