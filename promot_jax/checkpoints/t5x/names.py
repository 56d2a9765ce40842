"""Where T5X keeps the leaves of our tree: a parameter per layer, or stacks of layers where the model was scanned."""

import re
from collections.abc import Collection
from typing import NamedTuple

from promot_jax.checkpoints.placement import Shape

_RELPOS = "relpos_bias/rel_embedding"


class Place(NamedTuple):
    """The parameters that make a leaf of ours."""

    # "whole", "layers" (one for each), "scanned" (all in one, on an axis of their own), or "shared" (position biases
    # that a scanned model repeats in each layer, and ours has once).
    kind: str
    names: tuple[str, ...]  # T5X's
    shape: Shape  # of our leaf; of one layer where the kind is "layers"

    def fits(self, stored: Shape, axis: int) -> bool:
        """Whether a parameter of this shape is meant, where scanned models have their layers on `axis`."""
        if self.kind in ("whole", "layers"):
            return _is(self.names[0], stored, self.shape)
        if axis >= len(stored):
            return False
        layer = stored[:axis] + stored[axis + 1 :]
        if self.kind == "shared":
            return layer == self.shape
        return stored[axis] == self.shape[0] and _is(self.names[0], layer, self.shape[1:])


def find(path: str, shape: Shape, there: Collection[str]) -> Place:
    """Returns the place of a leaf in a checkpoint; its names may be missing there.

    Args:
        path: of the leaf, in `params["model"]`.
        shape: of the leaf.
        there: names of the checkpoint's parameters.
    """
    if not stacked(path):
        repeated = [name for name in _repeated(path) if name in there]
        shared = repeated and path not in there
        return Place("shared", (repeated[0],), shape) if shared else Place("whole", (path,), shape)
    stack, _, inner = path.partition("/layers/")
    for name in (path, f"{stack}/{stack}/{inner}"):  # T5X's own models, and Flaxformer's
        if name in there:
            return Place("scanned", (name,), shape)
    return Place("layers", per_layer(path, shape), shape[1:])


def stacked(path: str) -> bool:
    """Whether a leaf of ours has a layer on each row of its first axis."""
    return "/layers/" in path


def per_layer(path: str, shape: Shape) -> tuple[str, ...]:
    """T5X's names of a leaf of ours, one for each layer if it is stacked."""
    return tuple(path.replace("/layers/", f"/layers_{i}/") for i in range(shape[0] if stacked(path) else 1))


def stack_of(name: str) -> str | None:
    """Our stack of layers that a parameter belongs to by its name, "encoder/layers/", or None."""
    found = re.match(r"(\w+)/(layers|layers_\d+|\1)/", name)
    return found and f"{found[1]}/layers/"


def _repeated(path: str) -> list[str]:
    """Names that position biases have in the layers of scanned models."""
    if not path.endswith(_RELPOS):
        return []
    stack = path.removesuffix(f"/{_RELPOS}")
    return [
        f"{stack}/{inner}/{module}/rel_embedding"
        for inner in ("layers", stack)
        for module in ("relpos_bias", "relative_posemb")
    ]


def _is(name: str, stored: Shape, shape: Shape) -> bool:
    """Whether a shape is ours, or that of an attention kernel that keeps heads and their size apart.

    Those are `[embed, heads, size]` or, on the way out, `[heads, size, embed]`.
    """
    if stored == shape:
        return True
    if not re.search(r"attention/(query|key|value|out)/kernel$", name) or (len(stored), len(shape)) != (3, 2):
        return False
    first, second, third = stored
    return shape == ((first * second, third) if name.endswith("out/kernel") else (first, second * third))
