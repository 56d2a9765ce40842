"""The training losses, in chunks of target positions if the vocabulary is too large for all logits at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax.models import Model

Array = jax.Array

CHUNK = 2**25  # logits of a chunk per device: 128 MiB in float32


def cross_entropy(logits: Array, targets: Array, weights: Array, label_smoothing: float) -> Array:
    """Returns the sum over target tokens of the cross-entropy with smoothed labels, in nats.

    Args:
        logits: `[batch, targets, vocab]`.
        targets: `[batch, targets]`.
        weights: `[batch, targets]`, 0 at padding.
        label_smoothing: total probability of all tokens but the target, as in T5X; the entropy of the smoothed labels,
            a constant, is subtracted.
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
    model: Model, params: Any, hidden: Array, targets: Array, weights: Array, label_smoothing: float
) -> Array:
    """Returns `cross_entropy` for hidden states; the logits of one chunk exist at a time, in the backward pass too.

    Chunks split the target positions, never the batch, which is split over devices. The backward pass recomputes a
    chunk's logits. If one chunk is enough, nothing is recomputed. `hidden` is `[batch, targets, embed]`.
    """

    def total(hidden: Array, targets: Array, weights: Array) -> Array:
        # Parameters are a closure: as an argument, the loop would carry gradients of the whole model.
        return cross_entropy(model.head(params, hidden), targets, weights, label_smoothing)

    return _in_chunks(total, model, (hidden, targets, weights), model.config.vocab_size)


def chunked_divergence(
    model: Model, params: Any, hidden: Array, base: Any, base_hidden: Array, weights: Array
) -> Array:
    """Returns the sum over target tokens of KL(base || tuned) of the next token, in nats, in chunks as above.

    Args:
        model: its `head` computes the logits.
        params: of the tuned model, whose states that predict the targets are `hidden`, `[batch, targets, embed]`.
        hidden: see there.
        base: parameters of the frozen base model, whose states are `base_hidden`, of the same shape.
        base_hidden: see there.
        weights: `[batch, targets]`, 0 at padding.
    """

    def total(hidden: Array, base_hidden: Array, weights: Array) -> Array:
        tuned = jax.nn.log_softmax(model.head(params, hidden), axis=-1)
        reference = jax.nn.log_softmax(model.head(base, base_hidden), axis=-1)
        return jnp.sum(jnp.sum(jnp.exp(reference) * (reference - tuned), axis=-1) * weights)

    return _in_chunks(total, model, (hidden, base_hidden, weights), 2 * model.config.vocab_size)


def chunked_per_token(
    model: Model, params: Any, hidden: Array, targets: Array, measure: Callable[[Array, Array], Array]
) -> Array:
    """`measure(log_probs, targets)` of every target token, `[batch, targets]`, without a gradient, in chunks as above.

    `measure` takes log-probabilities `[batch, some targets, vocab]` and `[batch, some targets]`, returns the latter
    shape.
    """

    def measured(part: tuple[Array, Array]) -> Array:
        return measure(jax.nn.log_softmax(model.head(params, part[0]), axis=-1), part[1])

    batch, length = targets.shape
    chunks = _chunks(model, batch, length, model.config.vocab_size)
    if chunks == 1:
        return jax.lax.stop_gradient(measured((hidden, targets)))
    parts = jax.lax.map(measured, _cut((hidden, targets), chunks))
    return jax.lax.stop_gradient(parts.swapaxes(0, 1).reshape(batch, -1)[:, :length])


def _in_chunks(total: Callable[..., Array], model: Model, arrays: tuple[Array, ...], logits: int) -> Array:
    """Returns the sum of `total(*arrays)` over chunks of `arrays`, `[batch, targets, ...]`; `logits` are per target."""
    batch, length = arrays[-1].shape
    chunks = _chunks(model, batch, length, logits)
    if chunks == 1:
        return total(*arrays)

    def add(partial_sum: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return partial_sum + jax.checkpoint(total)(*chunk), None

    return jax.lax.scan(add, jnp.float32(0), _cut(arrays, chunks))[0]


def _chunks(model: Model, batch: int, length: int, logits: int) -> int:
    """Number of chunks of `length` target positions, at least one position each, by the logits of a position.

    All devices of the model's mesh share a chunk: with fewer chunks, a sharded head is gathered less often.
    """
    devices = model.partitioner.mesh().size if model.partitioner else 1
    return -(-length // max(CHUNK * devices // logits // batch, 1))


def _cut(arrays: tuple[Array, ...], chunks: int) -> tuple[Array, ...]:
    """Cuts `[batch, targets, ...]` into `[chunks, batch, positions, ...]`, zeros after the last target."""
    batch, length = arrays[-1].shape
    positions = -(-length // chunks)  # per chunk, as even as possible

    def cut(array: Array) -> Array:
        padding = [(0, 0), (0, chunks * positions - length), *[(0, 0)] * (array.ndim - 2)]
        return jnp.pad(array, padding).reshape(batch, chunks, positions, *array.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, arrays))
