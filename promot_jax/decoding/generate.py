"""Generation with a KV cache, for every model family: `prefill`, then `step` until all rows are done.

Greedy and sampled decoding of one batch are here, `continuous_batching` fills the places of finished rows, and beam
search is in `beam_search`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promot_jax.decoding.beam_search import search
from promot_jax.decoding.settings import Decoding
from promot_jax.models import Model

Array = jax.Array


class Rows(NamedTuple):
    """What the rows of a batch have generated."""

    outputs: Array  # int32 `[batch, max_tokens]`, -1 after the last token
    length: Array  # tokens so far, int32 `[batch]`
    token: Array  # the last one, which the next step appends, int32 `[batch]`
    done: Array  # whether a row has ended, bool `[batch]`
    limits: Array  # longest outputs in tokens, int32 `[batch]`
    seeds: Array  # of sampling, uint32 `[batch]`


def begin(settings: Decoding, limits: Array, seeds: Array, done: Array) -> Rows:
    """Returns rows without an output yet; those that are `done` get none."""
    outputs = jnp.full((len(limits), settings.max_tokens), -1, jnp.int32)
    zeros = jnp.zeros(len(limits), jnp.int32)
    return Rows(outputs, zeros, zeros, done, limits, seeds)


def put(rows: Rows, logits: Array, settings: Decoding, stops: Array, key: Array) -> Rows:
    """Chooses and appends the next token of each row that is not done, by logits `[batch, vocab]`.

    The random key of a token is a function of `key`, the row's seed and the token's number: not of the row's place, and
    not of its neighbours.
    """
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.fold_in(key, seed), count))(
        rows.seeds, rows.length
    )
    token = choose(logits, settings, keys)
    written = (jnp.arange(settings.max_tokens) == rows.length[:, None]) & ~rows.done[:, None]
    return rows._replace(
        outputs=jnp.where(written, token[:, None], rows.outputs),
        length=rows.length + ~rows.done,
        token=token,
        done=rows.done | stops[token] | (rows.length + 1 >= rows.limits),
    )


def choose(logits: Array, settings: Decoding, keys: Array) -> Array:
    """Chooses the next token of each row: logits `[batch, vocab]` and random keys `[batch]` to int32 `[batch]`."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, warp(logits, settings)).astype(jnp.int32)


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
        key: random key for sampling; each row draws with one of its own.

    Returns:
        int32 `[batch, max_tokens]`, -1 after the stop token; from a beam search, the best hypothesis of each row.
    """
    if settings.beams > 1:
        return search(model, settings, params, prompt, inputs, stops, limits)
    logits, state = model.prefill(params, prompt, inputs, settings.max_tokens)
    lengths = inputs["lengths"]
    seeds = jnp.arange(len(lengths), dtype=jnp.uint32)
    # Padding rows are done: they must not keep the batch running.
    rows = begin(settings, jnp.broadcast_to(limits, lengths.shape), seeds, lengths == 0)

    def advance(carry: Any) -> Any:
        rows, state = carry
        logits, state = model.step(params, state, rows.token)
        return put(rows, logits, settings, stops, key), state

    carry = (put(rows, logits, settings, stops, key), state)
    return jax.lax.while_loop(lambda carry: ~carry[0].done.all(), advance, carry)[0].outputs
