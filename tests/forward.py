"""Whole forward passes, for models small enough to hold all logits at once."""

import functools

import jax

from promot_jax.models import Model, Params


@functools.partial(jax.jit, static_argnums=0)
def target_logits(
    model: Model, params: Params, prompt: jax.Array | None, batch: Params, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Logits `[batch, targets, vocab]` of a batch of `model.layout`; `prompt` `[prompt rows, embed]` or None."""
    return model.head(params, model.hidden(params, prompt, batch, dropout_key))
