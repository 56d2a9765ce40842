"""Log-likelihoods of given continuations: each input is processed once for all of its continuations."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.decoding.continuous_batching import Engine, Input, prefix_state, waiting_batches
from promot_jax.distributed import hosts, preemption
from promot_jax.models import Model

Array = jax.Array
Scored = tuple[int, np.ndarray]  # index of an input, and a log-likelihood per continuation


def log_likelihoods(
    engine: Engine,
    inputs: Sequence[Input],
    continuations: Sequence[Sequence[Sequence[int]]],
    given: Sequence[int] | None = None,
) -> Iterator[Scored]:
    """Scores the continuations of each input by the sum of their tokens' log-probabilities.

    Args:
        engine: model and sizes of batches; how it decodes does not matter.
        inputs: their `limit` and `seed` do not matter.
        continuations: of each input, token ids.
        given: of each input, how many of the first tokens of its continuations are given, not scored; None for none.

    Yields:
        The index of each input with float32 `[continuations]`, as they are finished, while the device goes on.

    Raises:
        UserError: an input is empty or too long.
        PreemptedError: between two batches.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, each in enumerate(continuations):
        shapes.setdefault((_power(len(each)), _power(max(map(len, each)))), []).append(index)
    finished: list[Scored] = []
    for (count, length), indices in shapes.items():
        members = [inputs[index] for index in indices]
        prefixes: dict[tuple[int, ...], Any] = {}
        for waiting in waiting_batches(members, engine.prefill_tokens, engine, count * length):
            places = [indices[member] for member in waiting.members]
            tokens = np.full((len(waiting.batch["lengths"]), count, length), -1, np.int32)
            for row, index in enumerate(places):
                for number, ids in enumerate(continuations[index]):
                    tokens[row, number, : len(ids)] = ids
            first = np.zeros(len(tokens), np.int32)
            first[: len(places)] = [given[index] if given else 0 for index in places]
            batch = engine.partitioner.batch({**waiting.batch, "continuations": tokens, "given": first})
            prefix = prefix_state(engine, waiting.prefix, prefixes)
            scores = _scores(engine.model, engine.params, engine.table, batch, prefix)
            yield from finished
            rows = zip(places, hosts.whole(scores), strict=False)
            finished = [(index, row[: len(continuations[index])]) for index, row in rows]
            preemption.check("during an evaluation")
    yield from finished


def _power(count: int) -> int:
    """The least power of two that is not below a count: few shapes, so that few programs are compiled."""
    return 1 << (count - 1).bit_length()


@partial(jax.jit, static_argnames="model")
def _scores(model: Model, params: Any, table: Array | None, batch: Any, prefix: Any) -> Array:
    """Log-likelihoods `[batch, count]` of `batch["continuations"]` `[batch, count, length]`, padded with -1.

    Of each row the first `batch["given"]` tokens do not count.
    """
    tokens = batch["continuations"]
    hidden = model.branches(params, table, batch, jnp.maximum(tokens, 0), prefix)

    def of_place(part: tuple[Array, Array, Array]) -> Array:
        """Log-probabilities `[batch, count]` of the tokens at one place: all at once, logits would take much memory."""
        states, ids, place = part
        logits = model.head(params, states)
        chosen = jnp.take_along_axis(logits, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
        counts = (ids >= 0) & (place >= batch["given"][:, None])
        return jnp.where(counts, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    places = jnp.arange(tokens.shape[2])
    return jax.lax.map(of_place, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(tokens, 2, 0), places)).sum(axis=0)
