"""What a stage trains: rooms of the parameters, less what path patterns freeze, down to single layers of a stack.

Layers are stacked on the leading axis of their leaves and scanned. A pattern may name the whole stack,
`model/decoder/layers/mlp/wo/kernel`, or one of its layers as T5X would, `model/decoder/layers_3/mlp/wo/kernel`. A stack
of which every layer is frozen is a constant of the step like any frozen leaf. One that is frozen in part is trained
with a mask: gradients and updates of the frozen layers are zero, weight decay included, and their weights stay bitwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from promot_jax import trees
from promot_jax.errors import UserError

_STACK = "/layers/"


def lower_layers(count: int) -> tuple[str, ...]:
    """Patterns of so many of the lowest layers, of encoder and decoder each, and of what feeds or serves them all.

    That are the token embedder and T5's relative position biases. A stack with fewer layers is frozen whole.

    Raises:
        UserError: not a number of layers.
    """
    if count < 1:
        raise UserError(f"FREEZE has to be at least one layer, or patterns over parameter paths, not {count}.")
    shared = "model/(token_embedder|(encoder|decoder)/relpos_bias)/.*"
    return (shared, *(f"model/(encoder|decoder)/layers_{i}/.*" for i in range(count)))


def split(params: Mapping[str, Any], rooms: Sequence[str], freeze: Sequence[str]) -> tuple[trees.Tree, trees.Tree]:
    """Returns the trees of trained and of frozen leaves.

    Args:
        params: `{"model": ..., "prompt": ..., "lora": ...}`.
        rooms: that are trained.
        freeze: patterns of what is not.

    Raises:
        UserError: a pattern that is broken or matches nothing in these rooms.
    """
    kept = _kept({path: leaf for path, leaf in trees.flatten(params).items() if path.startswith(_rooms(rooms))}, freeze)
    return trees.partition(params, lambda path: path in kept and bool(kept[path].any()))


def layer_masks(trained: Mapping[str, Any], freeze: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns, of the stacks that are trained in part, which layers are: `{path: bool [layers]}`."""
    if not freeze:
        return {}
    kept = _kept(trees.flatten(trained), freeze, whole=False)
    return {path: mask for path, mask in kept.items() if not mask.all()}


def count(trained: Mapping[str, Any], freeze: Sequence[str]) -> int:
    """Number of parameters that are trained, frozen layers of the stacks not counted."""
    flat = trees.flatten(trained)
    frozen = sum(
        int(np.sum(~mask)) * flat[path].size // len(mask) for path, mask in layer_masks(trained, freeze).items()
    )
    return trees.count(trained) - frozen


def apply(masks: Mapping[str, np.ndarray], tree: trees.Tree, otherwise: trees.Tree | None = None) -> trees.Tree:
    """Returns a tree with the frozen layers' entries those of `otherwise`, zero where that is None."""
    if not masks:
        return tree
    flat, other = trees.flatten(tree), trees.flatten(otherwise or {})
    for path, mask in masks.items():
        shaped = mask.reshape(-1, *[1] * (flat[path].ndim - 1))
        flat[path] = jnp.where(shaped, flat[path], other.get(path, 0))
    return trees.unflatten(flat)


def _rooms(rooms: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{room}/" for room in rooms)


def _kept(leaves: Mapping[str, Any], freeze: Sequence[str], *, whole: bool = True) -> dict[str, np.ndarray]:
    """Which layers of each leaf are trained, `{path: bool [layers]}`; a leaf that is no stack counts as one layer.

    With `whole`, `leaves` are all of the stage's, so that every pattern has to match one.
    """
    names: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        head, stacked, tail = path.partition(_STACK)
        names[path] = [f"{head}/layers_{i}/{tail}" for i in range(leaf.shape[0])] if stacked else [path]
    rules = [*((pattern, False) for pattern in freeze), (".*", True)]
    known = {*leaves, *(name for layers in names.values() for name in layers)}
    found = trees.cover(rules, sorted(known)) if whole else {name: trees.lookup(rules, name) for name in known}
    return {path: np.array([found[path] and found[name] for name in layers]) for path, layers in names.items()}
