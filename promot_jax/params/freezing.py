"""Freezing: splits parameters into trained and frozen leaves by subtree and path pattern, down to single layers.

Layers are stacked on the leading axis of their leaves and scanned. A pattern may name the whole stack,
`model/decoder/layers/mlp/wo/kernel`, or one layer as T5X does, `model/decoder/layers_3/mlp/wo/kernel`. A stack whose
layers are all frozen is a constant of the step, like any frozen leaf. A stack with some frozen layers is trained with
a mask: gradients and updates of the frozen layers are zero, weight decay included, and their weights stay bitwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from promot_jax import trees
from promot_jax.errors import UserError

_STACK = "/layers/"


def lower_layers(count: int) -> tuple[str, ...]:
    """Returns patterns for the lowest `count` layers of encoder and decoder, and for what all layers share.

    Shared are the token embedder and T5's relative position biases. A stack with fewer layers is frozen as a whole.

    Raises:
        UserError: `count` is less than 1.
    """
    if count < 1:
        raise UserError(f"FREEZE has to be at least one layer, or patterns over parameter paths, not {count}.")
    shared = "model/(token_embedder|(encoder|decoder)/relpos_bias)/.*"
    return (shared, *(f"model/(encoder|decoder)/layers_{i}/.*" for i in range(count)))


def split(params: Mapping[str, Any], subtrees: Sequence[str], freeze: Sequence[str]) -> tuple[trees.Tree, trees.Tree]:
    """Returns the trees of trained and of frozen leaves.

    Args:
        params: `{"model": ..., "prompt": ..., "lora": ...}`.
        subtrees: the keys of `params` that are trained, less what `freeze` matches.
        freeze: patterns over parameter paths.

    Raises:
        UserError: a pattern is not a regular expression, or matches nothing in these subtrees.
    """
    leaves = trees.flatten({name: tree for name, tree in params.items() if name in subtrees})
    trained = _trained_layers(leaves, freeze)
    return trees.partition(params, lambda path: path in trained and bool(trained[path].any()))


def layer_masks(trained: Mapping[str, Any], freeze: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns which layers are trained, for stacks with some frozen layers: `{path: bool [layers]}`."""
    layers = _trained_layers(trees.flatten(trained), freeze, all_leaves=False)
    return {path: mask for path, mask in layers.items() if not mask.all()}


def count(trained: Mapping[str, Any], freeze: Sequence[str]) -> int:
    """Returns the number of trained parameters, without the frozen layers of stacks."""
    flat = trees.flatten(trained)
    masks = layer_masks(trained, freeze)
    return trees.count(trained) - sum(sum(~mask) * flat[path].size // len(mask) for path, mask in masks.items())


def apply(masks: Mapping[str, np.ndarray], tree: trees.Tree, otherwise: trees.Tree | None = None) -> trees.Tree:
    """Returns a tree whose frozen layers come from `otherwise`, or are zero if that is None."""
    flat, other = trees.flatten(tree), trees.flatten(otherwise or {})
    for path, mask in masks.items():
        shaped = mask.reshape(-1, *[1] * (flat[path].ndim - 1))
        flat[path] = jnp.where(shaped, flat[path], other.get(path, 0))
    return trees.unflatten(flat)


def _trained_layers(
    leaves: Mapping[str, Any], freeze: Sequence[str], *, all_leaves: bool = True
) -> dict[str, np.ndarray]:
    """Returns which layers of each leaf are trained, `{path: bool [layers]}`; a leaf outside a stack is one layer.

    With `all_leaves`, `leaves` are all leaves of the stage's subtrees, so that every pattern must match one of them.
    """
    names: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        head, stacked, tail = path.partition(_STACK)
        names[path] = [f"{head}/layers_{i}/{tail}" for i in range(leaf.shape[0])] if stacked else [path]
    rules = [*((pattern, False) for pattern in freeze), (".*", True)]
    known = sorted({*leaves, *(name for layers in names.values() for name in layers)})
    trained = trees.cover(rules, known) if all_leaves else {name: trees.lookup(rules, name) for name in known}
    return {path: np.array([trained[path] and trained[name] for name in layers]) for path, layers in names.items()}
