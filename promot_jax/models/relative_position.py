"""Relative position biases of T5 (Raffel et al., 2020, section 2.1): one per stack, shared by its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.distributed.partitioning import constrain

Array = jax.Array


def buckets(count: int, farthest: int, bidirectional: bool) -> np.ndarray:
    """Returns the bucket of every distance `key - query` from `-farthest` to `farthest`, int32 `[2 * farthest + 1]`.

    Both ends also stand for all larger distances. Half of the buckets hold one distance each, the others ranges of
    exponentially growing size. Bidirectional buckets are half for keys before the query, half for keys after it.

    Args:
        count: of buckets, a multiple of 4.
        farthest: distance from which on all keys share the last bucket.
        bidirectional: whether keys may lie after the query.
    """
    distance = np.arange(-farthest, farthest + 1)
    away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    first = np.zeros_like(distance)
    if bidirectional:
        count //= 2
        first = np.where(distance > 0, count, 0)
    exact = count // 2
    # 1e-9 keeps the first distance of a range in that range, despite rounding.
    position = np.log(np.maximum(away, 1) / exact) / np.log(farthest / exact) + 1e-9
    ranges = np.minimum(exact + np.floor(position * (count - exact)), count - 1)
    return (first + np.where(away < exact, away, ranges)).astype(np.int32)


class RelativeBias(nn.Module):
    """Bias of attention logits by the distance of key and query: one number per head and bucket."""

    num_heads: int
    count: int
    farthest: int
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """Maps positions `[queries]` and `[keys]` to biases `[1, heads, queries, keys]`, float32."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("rel_embedding", init, (self.num_heads, self.count), jnp.float32)
        bucket = jnp.asarray(buckets(self.count, self.farthest, self.bidirectional))
        distance = jnp.clip(keys[None, :] - queries[:, None], -self.farthest, self.farthest)
        # A product with one-hot rows: the gradient of a lookup would be a slow scatter.
        rows = jax.nn.one_hot(bucket[distance + self.farthest], self.count, dtype=jnp.float32)
        bias = jnp.einsum("hb,qkb->hqk", table.astype(jnp.float32), rows, precision="highest")[None]
        return constrain(bias, None, "heads", "length", None)
