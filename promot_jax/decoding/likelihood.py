"""Log-likelihoods of given continuations: each input is processed once for all of its continuations."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.decoding.inputs import Engine, Input, prefix_state, waiting_batches
from promot_jax.distributed import hosts, preemption
from promot_jax.models import Model

Array = jax.Array
Scored = tuple[int, np.ndarray]  # index of an input, and a log-likelihood per continuation


def log_likelihoods(engine: Engine, inputs: Sequence[Input]) -> Iterator[Scored]:
    """Scores the continuations of each input by the sum of their tokens' log-probabilities, and generates nothing.

    Args:
        engine: model and sizes of batches; how it decodes does not matter.
        inputs: with continuations; their `limit` and `seed` do not matter.

    Yields:
        The index of each input with float32 `[continuations]`, as they are finished, while the device goes on.

    Raises:
        UserError: an input is empty or too long.
        PreemptedError: between two batches.
    """
    finished: list[Scored] = []
    prefixes: dict[tuple[int, ...], Any] = {}
    for waiting in waiting_batches(inputs, engine.prefill_tokens, engine):
        batch, prefix = engine.partitioner.batch(waiting.batch), prefix_state(engine, waiting.prefix, prefixes)
        scores = _scores(engine.model, engine.params, engine.table, batch, prefix)
        yield from finished
        rows = zip(waiting.members.tolist(), hosts.whole(scores), strict=False)
        finished = [(member, row[: len(inputs[member].continuations)]) for member, row in rows]
        preemption.check("during an evaluation")
    yield from finished


@partial(jax.jit, static_argnames="model")
def _scores(model: Model, params: Any, table: Array | None, batch: Any, prefix: Any) -> Array:
    return of_continuations(model, params, table, batch, prefix)[0]


def of_continuations(
    model: Model, params: Any, table: Array | None, batch: Any, prefix: Any
) -> tuple[Array, Array, Any]:
    """Processes a batch with continuations (`Waiting.batch`), of which the first `unscored` tokens do not count.

    Returns:
        Log-likelihoods of the continuations `[batch, count]`, and what `Model.prefill` returns of the inputs.
    """
    tokens = batch["continuations"]
    hidden, logits, state = model.branches(params, table, batch, jnp.maximum(tokens, 0), prefix)

    def of_place(part: tuple[Array, Array, Array]) -> Array:
        """Log-probabilities `[batch, count]` of the tokens at one place: all at once, logits would take much memory."""
        states, ids, place = part
        logits = model.head(params, states)
        chosen = jnp.take_along_axis(logits, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
        counts = (ids >= 0) & (place >= batch["unscored"][:, None])
        return jnp.where(counts, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    places = jnp.arange(tokens.shape[2])
    scores = jax.lax.map(of_place, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(tokens, 2, 0), places)).sum(axis=0)
    return scores, logits, state
