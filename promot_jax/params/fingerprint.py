"""A hash of parameter values that does not depend on the mesh."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from promot_jax.distributed import hosts
from promot_jax.trees import flatten

_PIECE = 1 << 26  # bytes


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over paths, shapes, dtypes and bytes: equal only for bitwise equal parameters, on any mesh.

    If parameters are spread over hosts, all hosts call this together.
    """
    digest = Fingerprint()
    for path, leaf in flatten(tree).items():
        digest.add(path, leaf)
    return digest.hexdigest()


class Fingerprint:
    """Computes `fingerprint` leaf by leaf, for a tree that is never in memory as a whole."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, path: str, leaf: Any) -> None:
        """Adds the next leaf, in the order of `flatten`."""
        self._digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype}\n".encode())
        for piece in _pieces(leaf):
            self._digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Returns the fingerprint of the leaves so far."""
        return self._digest.hexdigest()


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """Yields a leaf's values as host arrays, in order.

    A device array caches its host copy, which would double the memory of a model on an accelerator or on several
    devices. So a large leaf comes in pieces: slices whose copies are freed one by one. An array on one CPU device needs
    none: the host reads the device's memory.
    """
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    devices = leaf.devices() if hasattr(leaf, "devices") else ()
    if size <= _PIECE or [device.platform for device in devices] in ([], ["cpu"]):
        yield hosts.whole(leaf)
        return
    if size // leaf.shape[0] > _PIECE:  # a stack of layers
        for row in range(leaf.shape[0]):
            yield from _pieces(leaf[row])
        return
    rows = max(1, _PIECE * leaf.shape[0] // size)
    for first in range(0, leaf.shape[0], rows):
        yield hosts.whole(leaf[first : first + rows])
