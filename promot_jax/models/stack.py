"""Stacks of layers, and the KV cache of their self-attention.

The parameters of a stack are one tree, whose leaves have a leading axis of layers that `nn.scan` runs over. While a CPU
generates, the layers may also be `apart`: a tuple of trees, one per layer. A scan copies each layer's weights and cache
out of the stacked arrays at every token, since on a CPU the operand of a matrix product is a buffer of its own. Where
layers are apart, a product reads a weight where it lies.

A cache is `key` and `value` `[layers, batch, kv_heads, slots, head_dim]`, in the order in which attention reads them;
where layers are apart, a tuple of caches without the first axis. (With an axis of one layer, XLA would update a cache
twice, once for attention and once for the next token, and copy it for that.)
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner, constrain

Array = jax.Array
Params = dict[str, Any]

# Logical axes of keys and values, and of their cache.
KEYS = ("batch", "kv_heads", "length", "head_dim")
CACHE = ("layers", *KEYS)


def run(
    stack: nn.Module, layer: nn.Module, count: int, carry: tuple[Array, Any], scanned: Any, shared: tuple[Any, ...]
) -> Any:
    """Applies the layers of a stack one after the other.

    Args:
        stack: bound module with the parameters "layers", and with `layers`, which scans over them.
        layer: unbound module of one layer, called with `(x, cache)`, its index in the cache (None for a cache
            of one layer), `*scanned` and `*shared`.
        count: of layers.
        carry: `x` `[batch, length, embed]`, and the cache of all layers or None.
        scanned: arguments by layer: arrays with a leading axis of layers, or tuples where the layers are apart.
        shared: arguments that all layers get.

    Returns:
        The carry; and the second results of the layers, stacked, or a tuple where they are apart.
    """
    own: Any = stack.get_variable("params", "layers")
    if not isinstance(own, tuple):
        return stack.layers(carry, jnp.arange(count), *scanned, *shared)
    x, cache = carry
    steps = []
    for index, params in enumerate(own):
        part = [value[index] for value in scanned]
        (x, extended), result = layer.apply({"params": params}, (x, cache[index]), None, *part, *shared)
        steps.append((extended, result))
    caches, results = zip(*steps, strict=True)
    return (x, caches), results


def apart(params: Params, partitioner: Partitioner) -> Params:
    """Returns the parameters with the decoder's layers apart where that saves copies: on a single CPU device.

    The layers share the memory of the stacked leaves where these are float32, and the result must not outlive them.
    """
    if jax.default_backend() != "cpu" or partitioner.mesh().size > 1:
        return params
    stacked = params["decoder"]["layers"]
    count = len(jax.tree.leaves(stacked)[0])
    layers = tuple(jax.tree.map(lambda leaf, index=index: _layer(leaf, index), stacked) for index in range(count))
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def _layer(leaf: Any, index: int) -> Any:
    if leaf.dtype != jnp.float32:
        return leaf[index]
    # By DLPack: `np.asarray` would leave a reference in the array, and then training could not donate it.
    (device,) = leaf.devices()
    return jax.device_put(np.from_dlpack(leaf)[index], device, may_alias=True)


def extend_cache(
    cache: dict[str, Array], new: dict[str, Array], layer: Array | None, cursor: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Writes a layer's new keys and values into the cache, from slot `cursor` on.

    Only the new slots are written; the rest of the cache is not copied.

    Args:
        cache: `key` and `value` `[layers, batch, kv_heads, slots, head_dim]`, or of one layer, without the first axis.
        new: `key` and `value` `[batch, kv_heads, length, head_dim]`.
        layer: index of the layer, None for a cache of one layer.
        cursor: slot of the first new token.

    Returns:
        The extended cache, and the layer's `key` and `value` `[batch, kv_heads, slots, head_dim]`.
    """
    new = {name: leaf.astype(cache[name].dtype) for name, leaf in new.items()}
    if layer is None:
        start: tuple[Any, ...] = (0, 0, cursor, 0)
        alone = {name: jax.lax.dynamic_update_slice(leaf, new[name], start) for name, leaf in cache.items()}
        return alone, alone
    start = (layer, 0, 0, cursor, 0)
    extended = {
        name: constrain(jax.lax.dynamic_update_slice(leaf, new[name][None], start), *CACHE)
        for name, leaf in cache.items()
    }
    return extended, {name: leaf[layer] for name, leaf in extended.items()}


def empty_cache(
    params: Mapping[str, Any], layers: int, shape: tuple[int, ...], dtype: str, partitioner: Partitioner | None
) -> Any:
    """Returns a cache of zeros, each layer's of a shape, with the layers apart where those of the parameters are."""
    if isinstance(params["decoder"]["layers"], tuple):
        return tuple(zeros(shape, dtype, partitioner) for _ in range(layers))
    return zeros((layers, *shape), dtype, partitioner)


def zeros(shape: tuple[int, ...], dtype: str, partitioner: Partitioner | None) -> dict[str, Array]:
    """Returns the empty cache of a shape for keys and values of a dtype.

    On a CPU it is float32: XLA would convert one of bfloat16 to float32 and back, all of it, to write a slot.
    """
    cpu = partitioning.device_of(partitioner).platform == "cpu"
    return {name: jnp.zeros(shape, jnp.float32 if cpu else dtype) for name in ("key", "value")}


def join_cache(cache: Any, new: dict[str, Array], rows: Array, cursor: Any) -> Any:
    """Puts rows of a new cache into the cache of a running batch, whose slots are a ring.

    Args:
        cache: `[layers, batch, kv_heads, slots, head_dim]`, or apart.
        new: `[layers, new rows, kv_heads, at most slots, head_dim]`, whose last slot comes right before `cursor`.
        rows: int32 `[new rows]`, where each goes; those outside of `[0, batch)` are left out.
        cursor: slot of the next token.
    """

    def join(leaf: Array, added: Array) -> Array:
        placed = in_ring(added, leaf.shape[-2], cursor, axis=added.ndim - 2)
        return leaf.at[(slice(None),) * (leaf.ndim - 4) + (rows,)].set(placed, mode="drop")

    if isinstance(cache, tuple):
        parts = [jax.tree.map(lambda leaf, index=index: leaf[index], new) for index in range(len(cache))]
        return tuple(jax.tree.map(join, own, part) for own, part in zip(cache, parts, strict=True))
    return jax.tree.map(join, cache, new)


def move_cache(cache: Any, rows: Array, slots: int, cursor: Any) -> Any:
    """Returns rows of a running batch's cache, in a ring of at least as many slots whose cursor is 0.

    Args:
        cache: `[layers, batch, kv_heads, slots, head_dim]`, or apart.
        rows: int32 `[new rows]`.
        slots: of the new ring.
        cursor: slot of the next token in the old ring; 0 for an axis of slots that is no ring, but ends alike.
    """

    def move(leaf: Array) -> Array:
        taken = jnp.take(leaf, rows, axis=leaf.ndim - 4, mode="clip")
        return in_ring(jnp.roll(taken, -cursor, axis=-2), slots, 0, axis=leaf.ndim - 2)

    return jax.tree.map(move, cache)


def in_ring(array: Array, slots: int, cursor: Any, axis: int, fill: Any = 0) -> Array:
    """Lays an axis of at most `slots` into a ring of `slots`, its end right before `cursor`, the rest filled up."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (slots - array.shape[axis], 0)
    return jnp.roll(jnp.pad(array, widths, constant_values=fill), cursor, axis)


def take_rows(leaf: Array, choice: Array, axis: int) -> Array:
    """Reorders the `groups * old` rows of a decoding state's leaf along its batch axis; see `Family.reorder`."""
    groups, new = choice.shape
    before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
    rows = leaf.reshape(*before, groups, -1, *after)
    index = choice.reshape(*[1] * axis, groups, new, *[1] * len(after))
    return jnp.take_along_axis(rows, index, axis=axis + 1).reshape(*before, groups * new, *after)
