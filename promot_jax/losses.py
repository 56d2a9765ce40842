"""The training loss, in chunks of target positions where the vocabulary is too large for all logits at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax.models import Model

Array = jax.Array

# Logits that exist at once on every device: 128 MiB in float32.
CHUNK = 2**25


def cross_entropy(logits: Array, targets: Array, weights: Array, label_smoothing: float) -> Array:
    """Sum over target tokens of the cross-entropy with smoothed labels, in nats.

    Args:
        logits: `[batch, targets, vocab]`.
        targets: `[batch, targets]`.
        weights: `[batch, targets]`, 0 at padding.
        label_smoothing: total probability of all tokens but the target, as in T5X; its constant entropy is taken off.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    vocab = logits.shape[-1]
    low = label_smoothing / (vocab - 1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - label_smoothing - low) * picked - low * log_probs.sum(axis=-1)
    if label_smoothing:
        loss += (1 - label_smoothing) * math.log(1 - label_smoothing) + label_smoothing * math.log(low)
    return jnp.sum(loss * weights)


def chunked_cross_entropy(
    model: Model,
    params: Any,
    hidden: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float,
    chunk: int | None = None,
) -> Array:
    """`cross_entropy` of the logits of hidden states, of which only a chunk exists at a time, backward too.

    Chunks are cut along the target positions, never along the batch, which devices share. The backward pass computes a
    chunk's logits again. Where one chunk holds everything, nothing is cut and nothing is computed twice.

    Args:
        model: its `head` makes the logits.
        params: of the model.
        hidden: `[batch, targets, embed]`.
        targets: `[batch, targets]`.
        weights: `[batch, targets]`, 0 at padding.
        label_smoothing: as for `cross_entropy`.
        chunk: logits of a chunk, over all devices; one position of the whole batch is the least. None is `CHUNK` times
            the devices: with fewer chunks, a sharded head is gathered less often.
    """
    if chunk is None:
        chunk = CHUNK * (model.partitioner.mesh().size if model.partitioner else 1)
    batch, length = targets.shape
    positions = max(chunk // (batch * model.config.vocab_size), 1)
    chunks = -(-length // positions)
    if chunks == 1:
        return cross_entropy(model.head(params, hidden), targets, weights, label_smoothing)
    positions = -(-length // chunks)  # as even as can be

    def cut(array: Array) -> Array:
        """`[batch, targets, ...]` to `[chunks, batch, positions, ...]`, zeros behind the last target."""
        padding = [(0, 0), (0, chunks * positions - length), *[(0, 0)] * (array.ndim - 2)]
        return jnp.pad(array, padding).reshape(batch, chunks, positions, *array.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint  # parameters as a closure: as an argument, gradients of the whole model would go through the loop
    def loss(hidden: Array, targets: Array, weights: Array) -> Array:
        return cross_entropy(model.head(params, hidden), targets, weights, label_smoothing)

    def add(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + loss(*part), None

    return jax.lax.scan(add, jnp.float32(0), (cut(hidden), cut(targets), cut(weights)))[0]
