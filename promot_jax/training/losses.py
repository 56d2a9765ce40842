"""The training losses, in chunks of target positions where the vocabulary is too large for all logits at once."""

import math
from collections.abc import Callable
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
    """

    def total(hidden: Array, targets: Array, weights: Array) -> Array:
        # Parameters as a closure: as an argument, gradients of the whole model would go through the loop.
        return cross_entropy(model.head(params, hidden), targets, weights, label_smoothing)

    return _in_chunks(total, (hidden, targets, weights), _room(model) // model.config.vocab_size)


def chunked_divergence(
    model: Model, params: Any, hidden: Array, base: Any, base_hidden: Array, weights: Array
) -> Array:
    """Sum over target tokens of KL(base || tuned) of the next token, in nats; in chunks as `chunked_cross_entropy`.

    Args:
        model: its `head` makes the logits.
        params: of the model that is tuned.
        hidden: its states that predict the targets, `[batch, targets, embed]`.
        base: parameters of the frozen base model.
        base_hidden: its states at the same targets, `[batch, targets, embed]`.
        weights: `[batch, targets]`, 0 at padding.
    """

    def total(hidden: Array, base_hidden: Array, weights: Array) -> Array:
        tuned = jax.nn.log_softmax(model.head(params, hidden), axis=-1)
        wanted = jax.nn.log_softmax(model.head(base, base_hidden), axis=-1)
        return jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - tuned), axis=-1) * weights)

    return _in_chunks(total, (hidden, base_hidden, weights), _room(model) // (2 * model.config.vocab_size))


def chunked_per_token(
    model: Model, params: Any, hidden: Array, targets: Array, measure: Callable[[Array, Array], Array]
) -> Array:
    """`measure(log_probs, targets)` of every target token, without a gradient; in chunks as `chunked_cross_entropy`.

    Args:
        model: its `head` makes the logits.
        params: of the model.
        hidden: `[batch, targets, embed]`.
        targets: `[batch, targets]`.
        measure: takes log-probabilities `[batch, some targets, vocab]` and `[batch, some targets]`, returns the latter
            shape.

    Returns:
        `[batch, targets]`.
    """

    def measured(part: tuple[Array, Array]) -> Array:
        return measure(jax.nn.log_softmax(model.head(params, part[0]), axis=-1), part[1])

    batch, length = targets.shape
    positions = max(_room(model) // model.config.vocab_size // batch, 1)
    if positions >= length:
        return jax.lax.stop_gradient(measured((hidden, targets)))
    parts = jax.lax.map(measured, _cut((hidden, targets), -(-length // positions)))
    return jax.lax.stop_gradient(parts.swapaxes(0, 1).reshape(batch, -1)[:, :length])


def _room(model: Model) -> int:
    """Logits of a chunk over all devices: with fewer chunks, a sharded head is gathered less often."""
    return CHUNK * (model.partitioner.mesh().size if model.partitioner else 1)


def _in_chunks(total: Callable[..., Array], arrays: tuple[Array, ...], rows: int) -> Array:
    """Sums `total` over chunks of the target positions of at most `rows` rows, at least one position each.

    Args:
        total: of arrays like `arrays`, of fewer positions, to a scalar.
        arrays: `[batch, targets, ...]`; the last one is the weights, by which padding counts nothing.
        rows: of all batch rows together, positions that may exist at once.
    """
    batch, length = arrays[-1].shape
    positions = max(rows // batch, 1)
    chunks = -(-length // positions)
    if chunks == 1:
        return total(*arrays)
    again = jax.checkpoint(total)

    def add(whole: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        return whole + again(*part), None

    return jax.lax.scan(add, jnp.float32(0), _cut(arrays, chunks))[0]


def _cut(arrays: tuple[Array, ...], chunks: int) -> tuple[Array, ...]:
    """`[batch, targets, ...]` each to `[chunks, batch, positions, ...]`, as even as can be, with zeros at the end."""
    batch, length = arrays[-1].shape
    positions = -(-length // chunks)

    def cut(array: Array) -> Array:
        padding = [(0, 0), (0, chunks * positions - length), *[(0, 0)] * (array.ndim - 2)]
        return jnp.pad(array, padding).reshape(batch, chunks, positions, *array.shape[2:]).swapaxes(0, 1)

    return tuple(map(cut, arrays))
