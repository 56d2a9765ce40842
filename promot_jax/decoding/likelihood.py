"""Log-likelihoods of given continuations: each input is processed once for all of its continuations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax.distributed.forward_programs import jit_forward
from promot_jax.models import Model

Array = jax.Array


@partial(jit_forward, static_argnames="model")
def of_batch(model: Model, params: Any, table: Array | None, batch: Any) -> Array:
    """Returns the log-likelihoods of a batch's continuations alone; see `of_continuations`."""
    return of_continuations(model, params, table, batch, None)[0]


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
