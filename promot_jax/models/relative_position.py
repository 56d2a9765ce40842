"""Relative position biases as in T5 (Raffel et al., 2020, section 2.1): one per stack, shared by all of its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.distributed.partitioning import constrain

Array = jax.Array


def buckets(count: int, farthest: int, bidirectional: bool) -> np.ndarray:
    """Bucket of every distance `key - query` from `-farthest` to `farthest`; both ends stand for all beyond them.

    Half of the buckets hold one distance each, the others spans that grow as powers. Bidirectional ones go by halves
    to keys before and after the query; causal ones know no keys after it.

    Args:
        count: of buckets, a multiple of 4.
        farthest: distance that falls into the last bucket.
        bidirectional: whether keys may lie after the query.

    Returns:
        int32 `[2 * farthest + 1]`.
    """
    distance = np.arange(-farthest, farthest + 1)
    away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    first = np.zeros_like(distance)
    if bidirectional:
        count //= 2
        first = np.where(distance > 0, count, 0)
    exact = count // 2
    # The small number keeps an exact power in the bucket that it opens.
    share = np.log(np.maximum(away, 1) / exact) / np.log(farthest / exact) + 1e-9
    spans = np.minimum(exact + np.floor(share * (count - exact)), count - 1)
    return (first + np.where(away < exact, away, spans)).astype(np.int32)


class RelativeBias(nn.Module):
    """What attention adds to its logits by the distance of key and query: one number per head and bucket."""

    num_heads: int
    count: int
    farthest: int
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """Positions `[queries]` and `[keys]` to biases `[1, heads, queries, keys]`, float32."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param("rel_embedding", init, (self.num_heads, self.count), jnp.float32)
        bucket = jnp.asarray(buckets(self.count, self.farthest, self.bidirectional))
        distance = jnp.clip(keys[None, :] - queries[:, None], -self.farthest, self.farthest)
        # A product with one-hot rows: the gradient of a look-up would be a slow scatter.
        rows = jax.nn.one_hot(bucket[distance + self.farthest], self.count, dtype=jnp.float32)
        bias = jnp.einsum("hb,qkb->hqk", table.astype(jnp.float32), rows, precision="highest")[None]
        return constrain(bias, None, "heads", "length", None)
