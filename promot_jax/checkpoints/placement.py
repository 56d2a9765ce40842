"""Streams tensors from outside straight to their (sharded) place: one leaf in memory besides those already placed.

A reader of a format describes each leaf of ours as an `Entry`: its shape and, per layer, a function that reads rows of
the tensor as it is stored. `load` asks for the rows that the devices at hand hold and for no others, a block at a time.
A format whose arrays are cut otherwise gives `place` a function that reads any box of a leaf. `check` is what is said
of a file whose tensors are not those of the model.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from promot_jax import trees
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.params.fingerprint import Fingerprint

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # first and last + 1 along each axis
# `read(first, count)`: rows `first` to `first + count` of a stored tensor, `[count, ...]`, of any float dtype.
Reader = Callable[[int, int], np.ndarray]

_BLOCK = 1 << 20  # values read at a time
_ALIGNMENT = 64  # bytes; a CPU device takes over a buffer aligned so, and copies any other


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one leaf comes from.

    Attributes:
        shape: of our leaf, `[layers, ...]` where it is stacked.
        parts: a reader per layer, or a single one.
        stacked: whether the parts are layers, stacked on axis 0.
        transposed: whether a part is stored as `[out, in]` and kept as `[in, out]`.
    """

    shape: Shape
    parts: tuple[Reader, ...]
    stacked: bool = False
    transposed: bool = False


class Placed(NamedTuple):
    """A model on the mesh.

    Attributes:
        params: `params["model"]`, float32; a `jax.ShapeDtypeStruct` for each leaf that is not kept.
        fingerprint: of all leaves, kept or not.
    """

    params: trees.Tree
    fingerprint: str


def load(entries: Mapping[str, Entry], partitioner: Partitioner, without: Collection[str] = ()) -> Placed:
    """Reads every entry to its place on the mesh.

    Args:
        entries: by path of the leaf in `params["model"]`.
        partitioner: the mesh and who holds what.
        without: paths of the leaves that are read for the fingerprint only, and let go at once.

    Raises:
        UserError: a value is not a finite number, a reader fails, or the mesh does not fit the shapes.
    """
    shapes = {path: entry.shape for path, entry in entries.items()}
    return place(shapes, lambda path, box: read(path, entries[path], box), partitioner, without)


def place(
    shapes: Mapping[str, Shape],
    reader: Callable[[str, Box], np.ndarray],
    partitioner: Partitioner,
    without: Collection[str] = (),
) -> Placed:
    """As `load`, for leaves that are read by `reader(path, box)`: float32 on a 64-byte boundary.

    Args:
        shapes: by path of the leaf in `params["model"]`.
        reader: of a box of a leaf.
        partitioner: the mesh and who holds what.
        without: as in `load`.
    """
    like = trees.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    mesh, specs = partitioner.mesh(), partitioner.specs({"model": like})
    placed, found = {}, Fingerprint()
    for path, leaf in trees.flatten(like).items():
        sharding = NamedSharding(mesh, specs[f"model/{path}"])
        array = jax.make_array_from_callback(leaf.shape, sharding, functools.partial(_part, {}, reader, path, leaf))
        found.add(path, array)
        kept = path not in without
        placed[path] = array if kept else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        del array  # before the next one is read
    return Placed(trees.unflatten(placed), found.hexdigest())


def _part(
    held: dict[Box, np.ndarray], reader: Callable[[str, Box], np.ndarray], path: str, leaf: Any, index: Any
) -> np.ndarray:
    """A device's part of a leaf; devices that hold the same part share what was read."""
    box = tuple(one.indices(size)[:2] for one, size in zip(index, leaf.shape, strict=True))
    if box not in held:
        held[box] = reader(path, box)
    return held[box]


class Stored(NamedTuple):
    """A tensor of a file: its shape, the format's name of its storage, and whether that is read."""

    shape: Shape
    kind: str
    readable: bool


def check(
    origin: str, wanted: Mapping[str, Shape], found: Mapping[str, Stored], spare: Callable[[str], object]
) -> None:
    """Raises one UserError that lists what is missing, unexpected, misshapen or stored in a way that is not read.

    Args:
        origin: file or folder, for the message.
        wanted: shapes of the model's tensors, as stored.
        found: the tensors that are there.
        spare: whether a tensor that the model has no place for may be there all the same.
    """
    there = {key: (found[key], shape) for key, shape in wanted.items() if key in found}
    problems = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key[:80] for key in found if key not in wanted and not spare(key)],
        "wrong shape": [f"{key} {one.shape} instead of {want}" for key, (one, want) in there.items() if one[0] != want],
        "storage that is not read": [f"{key} as {one.kind}" for key, (one, _) in there.items() if not one.readable],
    }
    listed = [
        f"{what}: {', '.join(items[:4])}{f' and {len(items) - 4} more' if len(items) > 4 else ''}"
        for what, items in problems.items()
        if items
    ]
    if listed:
        raise UserError(f"{origin} does not hold the tensors of the model it describes; {'; '.join(listed)}.")


def read(path: str, entry: Entry, bounds: Box) -> np.ndarray:
    """Reads a box of a leaf.

    Args:
        path: of the leaf, for messages.
        entry: where it comes from.
        bounds: of our leaf.

    Returns:
        float32, of the box's shape, aligned to 64 bytes.

    Raises:
        UserError: a value is not a finite number, or a reader fails.
    """
    array = aligned(tuple(last - first for first, last in bounds))
    layers, inner = (range(*bounds[0]), bounds[1:]) if entry.stacked else (range(1), bounds)
    (start, stop), *rest = inner[::-1] if entry.transposed else inner
    kept = (slice(None), *(slice(*one) for one in rest))
    stored = entry.shape[entry.stacked :][:: -1 if entry.transposed else 1]
    step = max(1, _BLOCK // int(np.prod(stored[1:])))
    for layer, target in zip(layers, array if entry.stacked else array[None], strict=True):
        rows = target.T if entry.transposed else target
        for first in range(start, stop, step):
            count = min(step, stop - first)
            block = entry.parts[layer](first, count)
            if not np.isfinite(block).all():
                raise UserError(
                    f"The checkpoint holds values for {path} that are not finite numbers; fetch or convert it again."
                )
            rows[first - start : first - start + count] = block[kept]
    return array


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a checkpoint's file, unbuffered. Raises UserError where that cannot be."""
    try:
        return io.FileIO(os.fspath(path), "rb")
    except OSError as error:
        raise UserError(f"Cannot read {os.fspath(path)!r}: {error.strerror or error}.") from error


def aligned(shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised array that starts where JAX's CPU device takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
