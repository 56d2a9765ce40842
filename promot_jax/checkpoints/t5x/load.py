"""Native T5X checkpoints in and out: `checkpoint_N/checkpoint`, flax msgpack, beside one zarr array per large leaf.

A T5X checkpoint says nothing about sizes: it is read against the shapes of a config's parameter tree. Each leaf is
found and checked before anything is allocated; then leaves are read one at a time, or only the slices of them that
a host needs. Layers are `encoder/layers_0/...` in the files and stacked on axis 0 of `encoder/layers/...` in ours.
Models that T5X scans have them stacked as well, as `encoder/layers/...` or `encoder/encoder/...`, mostly on axis 1.
"""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from promot_jax.checkpoints.placement import Box, Shape, aligned
from promot_jax.checkpoints.remote_files import local
from promot_jax.checkpoints.t5x import zarr
from promot_jax.checkpoints.t5x.msgpack import FLOATS, Index, read_msgpack
from promot_jax.checkpoints.t5x.names import Place, find, stack_of
from promot_jax.checkpoints.t5x.zarr import open_zarr
from promot_jax.errors import UserError

if TYPE_CHECKING:
    from tensorstore import TensorStore


Source: TypeAlias = Union[np.ndarray, "TensorStore"]  # in the msgpack file, or a zarr array of its own
_PLACEHOLDER = "PLACEHOLDER://"
_MAX_DEPTH = 24  # of a checkpoint's tree
_READERS = min(8, os.cpu_count() or 1)  # layers unpacked at a time


def is_checkpoint(path: Path) -> bool:
    """Whether there is a T5X checkpoint: the file itself, its folder, or a folder of them."""
    return _file(path) is not None


def refuse_tensorflow(path: Path) -> None:
    """Raises UserError for a checkpoint that TensorFlow wrote, as those of Mesh TensorFlow's T5 are.

    It is a file `checkpoint` of text, which may be the path itself, or files `model.ckpt-N.index`, `.meta` and
    `.data-*`, of which N may be meant.
    """
    part = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(path))
    start = b""
    folder = path.is_dir()
    with contextlib.suppress(OSError), (path / "checkpoint" if folder else path).open("rb") as stream:
        start = stream.read(21)
    indexed = folder and any(path.glob("model.ckpt-*.index"))
    if indexed or start == b"model_checkpoint_path" or os.path.isfile(f"{part}.index"):
        raise UserError(
            f"{path} is a TensorFlow checkpoint (Mesh TensorFlow's T5), a format that is not read; give the model's "
            "T5X or Hugging Face form, or convert it with T5X's convert_tf_checkpoint."
        )


def _file(path: Path) -> Path | None:
    """The msgpack file of a checkpoint: the path, or in its folder, or that of the newest in a folder of them."""
    if path.is_file():
        with path.open("rb") as stream:
            first = stream.read(1)
        return path if first and (0x80 <= first[0] < 0x90 or first[0] in (0xDE, 0xDF)) else None  # a msgpack map
    steps = {int(found[1]): p for p in path.glob("checkpoint_*") if (found := re.fullmatch(r".*_(\d{1,18})", p.name))}
    # One that T5X has not finished has another name. Flax's own is a file; Orbax keeps it a folder further down.
    for place in (path, *(steps[step] for step in sorted(steps, reverse=True))):
        for file in (place / "checkpoint", place / "state" / "checkpoint", place):
            if file.is_file():
                return file
    return None


class Checkpoint:
    """A checkpoint that holds every leaf of a model; nothing of it has been read yet."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        """Finds and checks every leaf.

        Args:
            path: a checkpoint's file or folder, or a folder of `checkpoint_N`, of which the newest is taken; local, or
                in a bucket (`locate`), from which arrays are read as they are asked for.
            shapes: our path -> shape, layers stacked, of every parameter of the model.

        Raises:
            UserError: no checkpoint there; it is damaged, or does not hold the model that the shapes describe.
        """
        self.folder, target, others = _target(path)
        self.shapes = dict(shapes)
        self._axes = {0, 1}  # on which the layers of a scanned model may lie
        self._places: dict[str, tuple[Place, list[Source]]] = {}
        for leaf, shape in self.shapes.items():
            place = find(leaf, shape, target)
            self._places[leaf] = place, [self._source(target, name, place) for name in place.names]
            for name in place.names:
                del target[name]
        self._axis = max(self._axes)  # 1 is T5X's own choice
        self.unused = tuple(target)  # parameters that the model has no place for (a soft prompt, say)
        for name in self.unused:
            self._may_stay_unused(name)
        # The optimizer's state is unused, too.
        self.leaves = {"loaded": len(self.shapes), "new": 0, "unused": len(target) + others}

    def read(self, path: str, box: Box | None = None) -> np.ndarray:
        """Reads a leaf, or a part of it.

        Args:
            path: ours.
            box: first and last + 1 along each axis; None for all of it.

        Returns:
            Float32, on a 64-byte boundary, so that a CPU device can take it as it is.

        Raises:
            UserError: a chunk or a value in it is damaged.
        """
        shape, (place, sources) = self.shapes[path], self._places[path]
        here = tuple(itertools.starmap(slice, box or [(0, size) for size in shape]))
        values = aligned(tuple(part.stop - part.start for part in here))
        try:
            if place.kind == "shared":
                values[...] = self._shared(path, sources[0])[here]
            elif place.kind == "layers":
                fill = functools.partial(_fill, index=here[1:], shape=shape[1:])
                with ThreadPoolExecutor(_READERS) as pool:
                    list(pool.map(fill, sources[here[0]], values))
            else:
                _fill(sources[0], values, here, shape, self._axis if place.kind == "scanned" else 0)
        except OSError as error:
            raise UserError(f"Cannot read {path} in {self.folder}: {error.strerror or error}.") from error
        if not np.isfinite(values).all():
            raise UserError(f"{self.folder} holds values in {path} that are not finite numbers; fetch it again.")
        return values

    def _shared(self, path: str, source: Source) -> np.ndarray:
        """The position biases that all layers have, `[heads, buckets]`."""
        layers = np.moveaxis(np.empty(source.shape, np.float32), self._axis, 0)
        _fill(source, layers, (slice(None),) * layers.ndim, layers.shape, self._axis)
        if not (layers == layers[:1]).all():
            raise UserError(
                f"{self.folder} has position biases of its own in every layer of {path.split('/')[0]} (as UMT5 has); "
                "our T5 has one table for all, so this checkpoint is of another model."
            )
        return layers[0]

    def _source(self, target: Mapping[str, Any], name: str, place: Place) -> Source:
        """Where a parameter lies, checked against the shape that its leaf has."""
        if name not in target:
            raise UserError(
                f"{self.folder} has no parameter {name!r}, which the model has: its config is of another kind or size."
            )
        what, leaf = f"The parameter {name!r} of {self.folder}", target[name]

        def check(stored: Shape) -> None:
            axes = {axis for axis in self._axes if place.fits(stored, axis)}
            if not axes:
                raise UserError(
                    f"{what} has shape {stored} and the model's config wants {place.shape}; choose another size."
                )
            if place.kind in ("scanned", "shared"):
                self._axes = axes

        return _open(self.folder, what, leaf, check)

    def _may_stay_unused(self, name: str) -> None:
        """Leaving out a layer, or the head, would make another model of it."""
        stack = stack_of(name)
        if (stack and any(path.startswith(stack) for path in self.shapes)) or name == "decoder/logits_dense/kernel":
            raise UserError(
                f"{self.folder} has a parameter {name!r}, for which the model has no place: its config is of another "
                "size; choose that of the checkpoint."
            )


def read_prompt(path: Path) -> np.ndarray:
    """Reads the soft prompt in a checkpoint, float32 `[length, embed]`: its one parameter of the name `prompt`.

    prompt-tuning keeps it as `encoder/prompt/prompt/prompt`.

    Raises:
        UserError: there is no checkpoint, it holds no such parameter or several, or it is damaged.
    """
    folder, target, _ = _target(path)
    prompts = [name for name in target if is_prompt(name)]
    if len(prompts) != 1:
        raise UserError(f"{path} holds {len(prompts)} parameters called 'prompt'; give a checkpoint with one.")
    what = f"The parameter {prompts[0]!r} of {path}"

    def check(stored: Shape) -> None:
        if len(stored) != 2:
            raise UserError(f"{what} has shape {stored}; a soft prompt has [length, embed].")

    source = _open(folder, what, target[prompts[0]], check)
    rows = np.empty(source.shape, np.float32)
    _copy(source, rows, tuple(slice(0, size) for size in rows.shape))
    return rows


def is_prompt(name: str) -> bool:
    """Whether a parameter is a soft prompt by its name."""
    return name.rpartition("/")[2] == "prompt"


def _open(folder: Path, what: str, leaf: Any, check: Callable[[Shape], None]) -> Source:
    """The values of a leaf of the msgpack file, or the zarr array that it names; `check` may refuse their shape."""
    if isinstance(leaf, np.ndarray):
        check(leaf.shape)
        if leaf.dtype.name not in FLOATS:
            raise UserError(f"{what} holds {leaf.dtype.name!r}, not floating point numbers; give another checkpoint.")
        return leaf
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        return open_zarr(folder, leaf.removeprefix(_PLACEHOLDER), {}, check)
    match leaf:
        case {"driver": "zarr", "kvstore": {"driver": "file" | "gfile" | "gcs"} as store, "metadata": dict()}:
            path = store.get("path", leaf.get("path"))  # the latter in files of older versions
            if isinstance(path, str):
                return open_zarr(folder, path, leaf, check)
    raise UserError(f"{what} is neither an array nor the place of one; fetch or write the checkpoint again.")


def _target(path: Path) -> tuple[Path, dict[str, Any], int]:
    """A checkpoint's folder, its parameters by T5X's path, and the number of other leaves (the optimizer's, say)."""
    file = _file(path)
    if file is None:
        raise UserError(f"{str(path)!r} holds no T5X checkpoint (a file named 'checkpoint'); give its folder.")
    if file != path and not file.resolve().is_relative_to(file.parent.resolve()):
        raise UserError(f"{file} is a link out of its folder; it is not read.")
    content = read_msgpack(local(file))
    version = content.get("version", 3) if isinstance(content, dict) else None
    if type(version) is not int or version > 3:
        raise UserError(f"{file} is no T5X checkpoint of format version 3; give the folder of one.")
    state = content
    for key in ("optimizer", "_optimizer"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state.get("target"), dict):
        raise UserError(f"{file} holds no parameters ('target'); give a T5X checkpoint of a model.")
    leaves = list(_leaves(state["target"]))
    target = dict(leaves)
    if len(target) != len(leaves):
        raise UserError(f"{file} holds a parameter twice; fetch or write it again.")
    everything = sum(1 for _ in _leaves(content)) - ("version" in content)
    return file.parent, target, everything - len(target)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; the place of a zarr array is a leaf, and None is not."""
    if isinstance(tree, dict) and not {"driver", "kvstore"} <= set(tree):
        if path.count("/") > _MAX_DEPTH:
            raise UserError(f"{path[:80]} is nested deeper than {_MAX_DEPTH} levels; give another checkpoint.")
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}" if path else key)
    elif tree is not None:
        yield path, tree


def _fill(source: Source, target: np.ndarray, index: Index, shape: Shape, axis: int = 0) -> None:
    """Copies a part of a stored array into `target`.

    Args:
        source: whose shape is `shape`, or that with its heads apart; its axis `axis` is our first.
        target: of the part's shape.
        index: of the part in our leaf.
        shape: of our leaf.
        axis: of the layers in a scanned model.
    """
    with np.errstate(all="ignore"):  # wider floats may overflow; `read` looks at the result
        if len(source.shape) == len(shape):
            inner = [*index[1 : axis + 1], index[0], *index[axis + 1 :]]
            _copy(source, np.moveaxis(target, 0, axis), tuple(inner))
        else:
            whole = np.empty(source.shape, np.float32)
            _copy(source, whole, tuple(slice(0, size) for size in source.shape))
            target[...] = np.moveaxis(whole, axis, 0).reshape(shape)[index]


def _copy(source: Source, target: np.ndarray, index: Index) -> None:
    """Copies `source[index]` into `target`, which has its shape, cast to its dtype."""
    if isinstance(source, np.ndarray):
        target[...] = source[index]
    else:
        zarr.fill(target, source, index)
