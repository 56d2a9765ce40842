"""Streams tensors of a file onto the mesh: needs the memory of one leaf besides those already placed.

A format's reader describes each leaf as an `Entry`: its shape and, per layer, a function that reads rows of the stored
tensor. `load` reads only the rows of this host's devices, a block at a time. A format with other chunks gives `place` a
function that reads any box of a leaf. `check` compares the tensors of a file with those of the model.
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
# `reader(first, count)`: rows `first` to `first + count` of a stored tensor, `[count, ...]`, of any float dtype.
Reader = Callable[[int, int], np.ndarray]

_BLOCK = 1 << 20  # values read at a time
_ALIGNMENT = 64  # bytes; a CPU device uses such a buffer itself, and copies any other


@dataclasses.dataclass(frozen=True)
class Entry:
    """The source of one leaf."""

    shape: Shape  # of the leaf, `[layers, ...]` if it is stacked
    parts: tuple[Reader, ...]  # a reader per layer, or a single one
    stacked: bool = False  # whether the parts are layers, stacked on axis 0
    transposed: bool = False  # whether a part is stored as `[out, in]`; the leaf is `[in, out]`


class Placed(NamedTuple):
    """A model on the mesh."""

    params: trees.Tree  # `params["model"]`, float32; a `jax.ShapeDtypeStruct` for each leaf in `without`
    fingerprint: str  # of all leaves


def load(entries: Mapping[str, Entry], partitioner: Partitioner, without: Collection[str] = ()) -> Placed:
    """Reads every entry onto the mesh.

    Args:
        entries: by path of the leaf in `params["model"]`.
        partitioner: the mesh and the shardings.
        without: paths of leaves that are read for the fingerprint only, and released at once.

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
    """As `load`, for leaves of given `shapes` that `reader(path, box)` reads as float32 (best `aligned`)."""
    like = trees.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    mesh, specs = partitioner.mesh(), partitioner.specs({"model": like})
    placed, fingerprint = {}, Fingerprint()
    for path, leaf in trees.flatten(like).items():
        sharding = NamedSharding(mesh, specs[f"model/{path}"])
        array = jax.make_array_from_callback(leaf.shape, sharding, functools.partial(_part, {}, reader, path, leaf))
        fingerprint.add(path, array)
        abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        placed[path] = abstract if path in without else array
        del array  # before the next one is read
    return Placed(trees.unflatten(placed), fingerprint.hexdigest())


def _part(
    cache: dict[Box, np.ndarray], reader: Callable[[str, Box], np.ndarray], path: str, leaf: Any, index: Any
) -> np.ndarray:
    """A device's part of a leaf, read once for all devices with the same part."""
    box = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
    if box not in cache:
        cache[box] = reader(path, box)
    return cache[box]


class Stored(NamedTuple):
    """A tensor of a file: its shape, the format's name of its storage, and whether we can read that."""

    shape: Shape
    kind: str
    readable: bool


def check(
    origin: str, expected: Mapping[str, Shape], stored: Mapping[str, Stored], spare: Callable[[str], object]
) -> None:
    """Raises one UserError that lists tensors that are missing, unexpected, of a wrong shape, or in an unknown storage.

    Args:
        origin: file or folder, for the message.
        expected: shapes of the model's tensors, as stored.
        stored: the tensors of the file.
        spare: whether a tensor that the model does not use is allowed.
    """
    common = {key: (stored[key], shape) for key, shape in expected.items() if key in stored}
    problems = {
        "missing": [key for key in expected if key not in stored],
        "unexpected": [key[:80] for key in stored if key not in expected and not spare(key)],
        "wrong shape": [
            f"{key} {has.shape} instead of {shape}" for key, (has, shape) in common.items() if has.shape != shape
        ],
        "storage that is not read": [f"{key} as {has.kind}" for key, (has, _) in common.items() if not has.readable],
    }
    more = {name: f" and {len(keys) - 4} more" if len(keys) > 4 else "" for name, keys in problems.items()}
    if listed := [f"{name}: {', '.join(keys[:4])}{more[name]}" for name, keys in problems.items() if keys]:
        raise UserError(f"{origin} does not hold the tensors of the model it describes; {'; '.join(listed)}.")


def read(path: str, entry: Entry, bounds: Box) -> np.ndarray:
    """Reads the box `bounds` of a leaf: float32, of the box's shape, `aligned`.

    Raises UserError if a value is not a finite number (the message names `path`), or a reader fails.
    """
    array = aligned(tuple(last - first for first, last in bounds))
    layers, inner = (range(*bounds[0]), bounds[1:]) if entry.stacked else (range(1), bounds)
    (start, stop), *rest = inner[::-1] if entry.transposed else inner
    columns = (slice(None), *(slice(*bound) for bound in rest))
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
            rows[first - start : first - start + count] = block[columns]
    return array


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens a checkpoint's file, unbuffered; raises UserError if it cannot."""
    try:
        return io.FileIO(os.fspath(path), "rb")
    except OSError as error:
        raise UserError(f"Cannot read {os.fspath(path)!r}: {error.strerror or error}.") from error


def aligned(shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX's CPU device uses without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
