"""Log-likelihood of targets after inputs, both as token ids, in batches of a few shapes."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.data.batches import COARSE_WIDTHS
from promot_jax.distributed import hosts
from promot_jax.distributed.forward_programs import jit_forward
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.methods.base import log_prob
from promot_jax.models import Model
from promot_jax.models.batch_layout import Tokens
from promot_jax.training.losses import chunked_per_token

Array = jax.Array


def log_likelihoods(
    model: Model,
    params: Any,
    table: Array | None,
    pairs: Sequence[Tokens],
    partitioner: Partitioner,
    tokens_per_batch: int = 4096,
) -> list[tuple[float, bool]]:
    """Scores every pair.

    Args:
        model: of any family.
        params: `params["model"]`.
        table: of the soft prompts (`soft_prompts.table`), None for none.
        pairs: ids of inputs, their soft prompt's virtual ids included, and of targets; neither may be empty.
        partitioner: places batches.
        tokens_per_batch: tokens that are computed together.

    Returns:
        For each pair the sum over the target's tokens of their log-probabilities, in nats, and whether each of these
        tokens is the likeliest one.

    Raises:
        UserError: a pair is longer than the longest batch.
    """
    scored: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for members, (inputs, targets) in _groups(pairs, tokens_per_batch, partitioner.rows()):
        real = [index for index in members if index is not None]
        rows = [[] if index is None else [pairs[index]] for index in members]
        batch = model.layout(rows, inputs, targets)
        logs, likeliest = _per_token(model, params, table, partitioner.batch(batch))
        weights = batch["weights"]
        sums = (hosts.whole(logs) * weights).sum(axis=1, dtype=np.float64)
        greedy = ((hosts.whole(likeliest) > 0) | (weights == 0)).all(axis=1)
        for row, index in enumerate(real):
            scored[index] = float(sums[row]), bool(greedy[row])
    return scored


def _groups(pairs: Sequence[Tokens], budget: int, parts: int) -> Iterator[tuple[list[int | None], tuple[int, int]]]:
    """Indices of the pairs of each batch, None for rows of padding, and its room for inputs and targets."""
    by_shape: dict[tuple[int, int], list[int | None]] = {}
    for index, pair in enumerate(pairs):
        shape = (_width(len(pair.inputs)), _width(len(pair.targets)))
        by_shape.setdefault(shape, []).append(index)
    for shape, members in sorted(by_shape.items()):
        most = max(budget // sum(shape) // parts, 1) * parts
        rows = min(most, -(-(1 << (len(members) - 1).bit_length()) // parts) * parts)
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            yield part + [None] * (rows - len(part)), shape


def _width(length: int) -> int:
    """Room for so many tokens: few widths, since each compiles once."""
    if not 0 < length <= COARSE_WIDTHS[-1]:
        raise UserError(f"A text of {length} tokens has no log-likelihood; it needs 1 to {COARSE_WIDTHS[-1]}.")
    return next(width for width in (8, 16, *COARSE_WIDTHS) if width >= length)


@functools.partial(jit_forward, static_argnames="model")
def _per_token(model: Model, params: Any, table: Array | None, batch: Any) -> tuple[Array, Array]:
    """Log-probability of each target token, and 1 where it is the likeliest one, `[batch, targets]`."""

    def likeliest(log_probs: Array, targets: Array) -> Array:
        return (jnp.argmax(log_probs, axis=-1) == targets).astype(jnp.float32)

    hidden = model.hidden(params, table, batch)
    measured = functools.partial(chunked_per_token, model, params, hidden, batch["targets"])
    return measured(log_prob), measured(likeliest)
