"""Generation with a KV cache, for every model family: `prefill`, then `step` until all rows are done.

Greedy and sampled decoding are here, beam search is in `beam_search`.
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
    """Chooses the next token of each row: logits `[batch, vocab]` to int32 `[batch]`."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, warp(logits, settings), axis=-1).astype(jnp.int32)


def warp(logits: Array, settings: Decoding) -> Array:
    """Returns the logits `[batch, vocab]` to sample from: divided by the temperature, -inf for excluded tokens."""
    logits = logits / settings.temperature
    if settings.top_k:
        least = jax.lax.top_k(logits, min(settings.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if settings.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the mass before it is below top_p; so the likeliest always stays.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < settings.top_p
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
    """Generates an output for each row of a batch; compiled once per shape.

    Args:
        model: a model of any family.
        settings: of generation.
        params: of the model.
        prompt: prompt table `[prompt rows, embed]` or None; virtual ids in `inputs` refer to its rows.
        inputs: `tokens` `[batch, length]` and `lengths` `[batch]`.
        stops: bool `[vocab]`, True for tokens that end an output.
        limits: int32 `[batch]`, the longest output of each row in tokens, at most `settings.max_tokens`.
        key: random key for sampling.

    Returns:
        int32 `[batch, max_tokens]`, -1 after the stop token; from a beam search, the best hypothesis of each row.
    """
    if settings.beams > 1:
        return search(model, settings, params, prompt, inputs, stops, limits)
    logits, state = model.prefill(params, prompt, inputs, settings.max_tokens)
    padding = inputs["lengths"] == 0  # padding rows must not keep the batch running
    outputs = jnp.full((logits.shape[0], settings.max_tokens), -1, jnp.int32)

    def put(outputs: Array, count: Any, logits: Array, done: Array) -> tuple[Array, Array, Array]:
        token = choose(logits, settings, jax.random.fold_in(key, count))
        return outputs.at[:, count].set(jnp.where(done, -1, token)), token, done | stops[token] | (count + 1 >= limits)

    def advance(carry: Any) -> Any:
        count, done, outputs, token, state = carry
        logits, state = model.step(params, state, token)
        outputs, token, done = put(outputs, count, logits, done)
        return count + 1, done, outputs, token, state

    outputs, token, done = put(outputs, 0, logits, padding)
    carry = (jnp.int32(1), done, outputs, token, state)
    return jax.lax.while_loop(lambda carry: ~carry[1].all(), advance, carry)[2]
