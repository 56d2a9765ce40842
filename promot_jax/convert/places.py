"""Streams tensors from outside straight to their (sharded) place: one leaf in memory besides those already placed.

A reader of a format describes each leaf of ours as an `Entry`: its shape and, per layer, a function that reads rows of
the tensor as it is stored. `load` asks for the rows that the devices at hand hold and for no others, a block at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.partitioning import Partitioner

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

    shape: tuple[int, ...]
    parts: tuple[Reader, ...]
    stacked: bool = False
    transposed: bool = False


def load(entries: Mapping[str, Entry], partitioner: Partitioner) -> trees.Tree:
    """Reads every entry to its place on the mesh.

    Args:
        entries: by path of the leaf in `params["model"]`.
        partitioner: the mesh and who holds what.

    Returns:
        `params["model"]`, float32.

    Raises:
        UserError: a value is not a finite number, a reader fails, or the mesh does not fit the shapes.
    """
    shapes = {f"model/{path}": jax.ShapeDtypeStruct(entry.shape, np.float32) for path, entry in entries.items()}
    specs = partitioner.specs(trees.unflatten(shapes))
    mesh = partitioner.mesh()
    placed = {}
    for path, entry in entries.items():
        part = functools.partial(_part, {}, path, entry)
        placed[path] = jax.make_array_from_callback(entry.shape, NamedSharding(mesh, specs[f"model/{path}"]), part)
    return trees.unflatten(placed)


def _part(held: dict[Any, np.ndarray], path: str, entry: Entry, index: Any) -> np.ndarray:
    """A device's part of a leaf; devices that hold the same part share what was read."""
    bounds = tuple(one.indices(size)[:2] for one, size in zip(index, entry.shape, strict=True))
    if bounds not in held:
        held[bounds] = read(path, entry, bounds)
    return held[bounds]


def read(path: str, entry: Entry, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Reads a box of a leaf.

    Args:
        path: of the leaf, for messages.
        entry: where it comes from.
        bounds: first and last + 1 along each axis of our leaf.

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


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 that starts where JAX's CPU device takes it over without a copy."""
    size = math.prod(shape) * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
