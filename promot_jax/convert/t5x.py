"""Native T5X checkpoints in and out: `checkpoint_N/checkpoint`, flax msgpack, beside one zarr array per large leaf.

A T5X checkpoint says nothing about sizes: it is read against the shapes of a config's parameter tree. Each leaf is
found and checked before anything is allocated; then leaves are read one at a time, or only the slices of them that
a host needs. Layers are `encoder/layers_0/...` in the files and stacked on axis 0 of `encoder/layers/...` in ours.
Models that T5X scans have them stacked as well, as `encoder/layers/...` or `encoder/encoder/...`, mostly on axis 1.
"""

import functools
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from promot_jax import trees
from promot_jax.convert import remote, t5x_names, zarr
from promot_jax.convert.flax_msgpack import FLOATS, Index, read_msgpack
from promot_jax.convert.places import Box, Shape, aligned
from promot_jax.convert.t5x_names import Place
from promot_jax.convert.zarr import open_zarr
from promot_jax.errors import UserError

if TYPE_CHECKING:
    from tensorstore import TensorStore

Source: TypeAlias = Union[np.ndarray, "TensorStore"]  # in the msgpack file, or a zarr array of its own
_PLACEHOLDER = "PLACEHOLDER://"
_MAX_DEPTH = 24  # of a checkpoint's tree
_READERS = min(8, os.cpu_count() or 1)  # layers unpacked at a time
_INLINE = 1 << 14  # values: norm scales and position biases stay below it, as what T5X does not partition
_CHUNK = 1 << 26  # bytes of a zarr chunk


def is_checkpoint(path: Path) -> bool:
    """Whether there is a T5X checkpoint: the file itself, its folder, or a folder of them."""
    return _file(path) is not None


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
    """A checkpoint that holds every leaf of a model; nothing of it has been read yet.

    Attributes:
        shapes: our path -> shape, layers stacked.
        unused: paths of the parameters that the model has no place for (a soft prompt, say).
        leaves: how many leaves are loaded, new and unused; the optimizer's state is unused too.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        """Finds and checks every leaf.

        Args:
            path: a checkpoint's file or folder, or a folder of `checkpoint_N`, of which the newest is taken; local, or
                in a bucket (`remote.locate`), from which arrays are read as they are asked for.
            shapes: our path -> shape, of every parameter of the model.

        Raises:
            UserError: no checkpoint there; it is damaged, or does not hold the model that the shapes describe.
        """
        file = _file(path)
        if file is None:
            raise UserError(f"{str(path)!r} holds no T5X checkpoint (a file named 'checkpoint'); give its folder.")
        self.folder, self.shapes = file.parent, dict(shapes)
        if file != path and not file.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{file} is a link out of its folder; it is not read.")
        target, others = _target(read_msgpack(remote.local(file)), file)
        self._axes = {0, 1}  # on which the layers of a scanned model may lie
        self._places: dict[str, tuple[Place, list[Source]]] = {}
        for leaf, shape in self.shapes.items():
            place = t5x_names.find(leaf, shape, target)
            self._places[leaf] = place, [self._source(target, name, place) for name in place.names]
            for name in place.names:
                del target[name]
        self._axis = max(self._axes)  # 1 is T5X's own choice
        self.unused = tuple(target)
        for name in self.unused:
            self._may_stay_unused(name)
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

        if isinstance(leaf, np.ndarray):
            check(leaf.shape)
            if leaf.dtype.name not in FLOATS:
                raise UserError(
                    f"{what} holds {leaf.dtype.name!r}, not floating point numbers; give another checkpoint."
                )
            return leaf
        if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
            return open_zarr(self.folder, leaf.removeprefix(_PLACEHOLDER), {}, check)
        match leaf:
            case {"driver": "zarr", "kvstore": {"driver": "file" | "gfile" | "gcs"} as store, "metadata": dict()}:
                path = store.get("path", leaf.get("path"))  # the latter in files of older versions
                if isinstance(path, str):
                    return open_zarr(self.folder, path, leaf, check)
        raise UserError(f"{what} is neither an array nor the place of one; fetch or write the checkpoint again.")

    def _may_stay_unused(self, name: str) -> None:
        """Leaving out a layer, or the head, would make another model of it."""
        stack = t5x_names.stack_of(name)
        if (stack and any(path.startswith(stack) for path in self.shapes)) or name == "decoder/logits_dense/kernel":
            raise UserError(
                f"{self.folder} has a parameter {name!r}, for which the model has no place: its config is of another "
                "size; choose that of the checkpoint."
            )


def write(folder: str | os.PathLike[str], step: int, params: Mapping[str, Any], *, inline: int = _INLINE) -> Path:
    """Writes a checkpoint that T5X restores, and `Checkpoint` reads back bit for bit: `folder/checkpoint_<step>`.

    Args:
        folder: where checkpoints lie; made if needed.
        step: of training, as T5X will count on from it.
        params: our parameters, float32, bfloat16 or float16, layers stacked on axis 0.
        inline: leaves of fewer values go into the msgpack file.

    Returns:
        The checkpoint's folder, which appears only when it is complete.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    from flax import serialization

    final = Path(folder) / f"checkpoint_{int(step)}"
    if final.exists():
        raise UserError(f"{final} is there already; give another folder, or delete it.")
    scratch = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
        target = {
            name: array if array.size < inline else _write_zarr(scratch, f"target.{name.replace('/', '.')}", array)
            for path, leaf in trees.flatten(params).items()
            for name, array in _layers(path, leaf)
        }
        state = {"step": np.asarray(step, np.int32), "param_states": {}}
        content = {"version": 3, "optimizer": {"target": trees.unflatten(target), "state": state}}
        (scratch / "checkpoint").write_bytes(serialization.msgpack_serialize(content, in_place=True))
        scratch.chmod(0o755)  # mkdtemp's folders are for their owner only
        scratch.rename(final)
    except OSError as error:
        raise UserError(f"Cannot write {str(final)!r}: {error.strerror or error}.") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def _target(content: Any, file: Path) -> tuple[dict[str, Any], int]:
    """Parameters by T5X's path, and how many other leaves there are (of the optimizer's state, say)."""
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
    return target, everything - len(target)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; the place of a zarr array is a leaf, and None is not."""
    if isinstance(tree, dict) and not {"driver", "kvstore"} <= set(tree):
        if path.count("/") > _MAX_DEPTH:
            raise UserError(f"{path[:80]} is nested deeper than {_MAX_DEPTH} levels; give another checkpoint.")
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}" if path else key)
    elif tree is not None:
        yield path, tree


def _layers(path: str, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """T5X's names and arrays of a leaf of ours, one at a time."""
    for i, name in enumerate(t5x_names.per_layer(path, leaf.shape)):
        array = np.asarray(leaf[i] if t5x_names.stacked(path) else leaf, order="C")
        if array.dtype.name not in FLOATS:
            raise UserError(f"The parameter {path!r} is {array.dtype.name}; only floating point numbers are written.")
        yield name, array


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


def _write_zarr(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes one array as T5X does, and returns the spec that stands for it in the msgpack file."""
    import tensorstore as ts

    rows = min(array.shape[0], max(1, _CHUNK * array.shape[0] // array.nbytes))
    metadata = {
        "chunks": [rows, *array.shape[1:]],
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(array.shape),
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    place = {"driver": "file", "path": str(folder / name)}
    # Without the second option a chunk of zeros is not written, and to read it could not be told from a lost one.
    options = {"create": True, "store_data_equal_to_fill_value": True}
    ts.open({**spec, "kvstore": place, **options}).result().write(array).result()
    return {**spec, "kvstore": {"driver": "file", "path": name}}
