"""Decoding with a KV cache, for every family: `prefill`, then `step` until all rows are done.

Greedy and sampled here, beam search in `beam`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax.decoding.beam_search import search
from promot_jax.decoding.settings import Decoding
from promot_jax.models import Model

Array = jax.Array


def choose(logits: Array, settings: Decoding, key: Array) -> Array:
    """Picks the next token of each row: `[batch, vocab]` to int32 `[batch]`."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, warp(logits, settings), axis=-1).astype(jnp.int32)


def warp(logits: Array, settings: Decoding) -> Array:
    """Logits `[batch, vocab]` that are sampled from: over the temperature, and -inf where a token is left out."""
    logits = logits / settings.temperature
    if settings.top_k:
        least = jax.lax.top_k(logits, min(settings.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if settings.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the mass before it is below top_p: the likeliest always does.
        kept = jnp.cumsum(shares, axis=-1) - shares < settings.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


@partial(jax.jit, static_argnames=("model", "settings"))
def generate(
    model: Model,
    settings: Decoding,
    params: Any,
    prompt: Array | None,
    inputs: Any,
    stops: Array,
    limits: Array,
    key: Array,
) -> Array:
    """Decodes a batch; compiled once per shape.

    Args:
        model: its config.
        settings: how outputs are chosen.
        params: of the model.
        prompt: `[prompt rows, embed]` or None; the ids in `inputs` say which rows of the batch use it.
        inputs: `tokens` `[batch, length]` and `lengths` `[batch]`.
        stops: bool `[vocab]`.
        limits: int32 `[batch]`, tokens of each row's longest output, at most `settings.max_tokens`.
        key: random key, used when sampling.

    Returns:
        int32 `[batch, max_tokens]`; -1 behind the stop token. Of a beam search, the best hypothesis of each row.
    """
    if settings.beams > 1:
        return search(model, settings, params, prompt, inputs, stops, limits)
    logits, state = model.prefill(params, prompt, inputs, settings.max_tokens)
    # Padding rows are empty and must not keep the batch running.
    padding = inputs["lengths"] == 0
    outputs = jnp.full((logits.shape[0], settings.max_tokens), -1, jnp.int32)

    def put(outputs: Array, count: Any, logits: Array, done: Array) -> tuple[Array, Array, Array]:
        token = choose(logits, settings, jax.random.fold_in(key, count))
        return outputs.at[:, count].set(jnp.where(done, -1, token)), token, done | stops[token] | (count + 1 >= limits)

    def running(carry: Any) -> Array:
        return ~carry[1].all()

    def advance(carry: Any) -> Any:
        count, done, outputs, token, state = carry
        logits, state = model.step(params, state, token)
        outputs, token, done = put(outputs, count, logits, done)
        return count + 1, done, outputs, token, state

    outputs, token, done = put(outputs, 0, logits, padding)
    return jax.lax.while_loop(running, advance, (jnp.int32(1), done, outputs, token, state))[2]
