"""AdamW's update block by block: on a CPU it then reads and writes memory once.

XLA's CPU backend compiles the update of a leaf to a chain of loops, each of which reads and writes arrays of the leaf's
size. A block stays in the cache from one loop to the next. The arithmetic is optax's.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promot_jax import trees
from promot_jax.training.settings import Training

Array = jax.Array
Tree = trees.Tree
UpdateBlock = Callable[..., tuple[Array, list[Array]]]

BLOCK = 2**15  # elements: parameters, gradients and moments of a block take 0.5 MiB


def applies(training: Training, params: Tree, shardings: Any) -> bool:
    """Says whether a stage's update runs block by block: on one CPU device, where each element is updated alone.

    Args:
        training: Adafactor's update depends on means over rows and columns; AdamW's does not.
        params: trained leaves, all float32, none of them frozen in part.
        shardings: of the state, or None.
    """
    devices = {device for sharding in jax.tree.leaves(shardings) for device in sharding.device_set}
    alone = [device.platform for device in devices] == ["cpu"]
    plain = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    return alone and plain and training.optimizer.name == "adamw" and training.prompt_optimizer is None


def update(
    transform: optax.GradientTransformation, grads: Tree, state: Any, params: Tree, norm: Array
) -> tuple[Tree, Any, Array]:
    """Updates parameters block by block.

    Args:
        transform: updates each element alone, given the gradients' norm.
        grads: float32, of the structure of `params`.
        state: of `transform`.
        params: float32.
        norm: global norm of `grads`.

    Returns:
        The new parameters, the new state, and the global norm of the updates.
    """
    structure: Any = jax.tree.structure(params)
    run = optax.with_extra_args_support(transform).update

    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    outer: Any
    slots, outer = jax.tree.flatten(state, is_leaf=is_moment)  # moments, and step counts

    def with_moments(rest: Iterable[Any], moments: Iterable[Any]) -> Any:
        values = iter(moments)
        pairs = zip(slots, rest, strict=True)
        return outer.unflatten([next(values) if is_moment(slot) else other for slot, other in pairs])

    def moments_of(state: Any) -> list[Any]:
        pairs = zip(slots, outer.flatten_up_to(state), strict=True)
        return [value for slot, value in pairs if is_moment(slot)]

    def update_block(grad: Array, param: Array, *moments: Array) -> tuple[Array, list[Array]]:
        updates, new = run(grad, with_moments(slots, moments), param, norm=norm)
        return jnp.sum(jnp.square(updates)), [param + updates, *moments_of(new)]

    leaves = zip(*map(jax.tree.leaves, (grads, params, *moments_of(state))), strict=True)
    squares, updated = zip(*(_in_blocks(update_block, *leaf) for leaf in leaves), strict=True)
    new_params, *moments = (structure.unflatten(column) for column in zip(*updated, strict=True))
    counted = run({}, with_moments(slots, [{}] * len(moments)), {}, norm=norm)[1]  # counts alone, of no leaves
    new_state = with_moments(outer.flatten_up_to(counted), moments)
    return new_params, new_state, jnp.sqrt(sum(squares))


def _in_blocks(update_block: UpdateBlock, grad: Array, *values: Array) -> tuple[Array, list[Array]]:
    """Updates all blocks of a leaf.

    Args:
        update_block: returns the sum of the squared updates, and the new values.
        grad: of the leaf.
        *values: its parameters and moments, which are updated in place.
    """
    shape = _block_shape(grad.shape)
    if math.prod(shape) == grad.size:
        return update_block(grad, *values)
    grads = grad.reshape(-1, *shape)

    def keep(_: Array, *parts: Array) -> tuple[Array, list[Array]]:
        return jnp.float32(0), [*parts]

    def body(index: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        squares, old = carry
        parts = [leaf[index] for leaf in old]
        # The condition is always true. Without one, XLA would fuse the arithmetic into the writes, which then read what
        # others write: it would copy whole leaves.
        more, new = jax.lax.cond(index < len(grads), update_block, keep, grads[index], *parts)
        put = jax.lax.dynamic_update_index_in_dim
        return squares + more, [put(leaf, part, index, 0) for leaf, part in zip(old, new, strict=True)]

    start = jnp.float32(0), [leaf.reshape(grads.shape) for leaf in values]
    squares, updated = jax.lax.fori_loop(0, len(grads), body, start)
    return squares, [leaf.reshape(grad.shape) for leaf in updated]


def _block_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the blocks of a leaf: as many rows as fit, of those numbers that divide the leaf's rows."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    most = min(max(BLOCK // columns, 1), rows)
    number = max(number for number in range(1, most + 1) if rows % number == 0)
    return (number if 8 * number > most else rows), columns  # a loop over many tiny blocks would take longer
