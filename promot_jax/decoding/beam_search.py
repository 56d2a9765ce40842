"""Beam search with a KV cache, for every model family, by the rules of T5X.

A hypothesis is live until it takes a stop token; then it is finished, and its score is its log-probability divided by
`((5 + length) / 6) ** length_penalty` (Wu et al., 2016, section 7), the stop token included in the length. Each step
ranks the likeliest `2 * beams` continuations: those with a stop token are finished, the first `beams` of the others
stay live. A hypothesis that reaches its length limit counts only if none is finished.

T5X keeps the best `beams` finished hypotheses and stops when no live one can beat the worst of them. Finished ones
never displace live ones, and only the best is returned. So this search keeps the best one alone, and a row is done when
no live hypothesis can beat it: earlier, with the same result.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from promot_jax.decoding.settings import Decoding
from promot_jax.models import Model

Array = jax.Array


class Beams(NamedTuple):
    """The state of a search."""

    length: Array  # tokens so far, the same in every row that still runs
    scores: Array  # log-probabilities of the live hypotheses, likeliest first, -inf for none, `[batch, beams]`
    live: Array  # tokens of the live hypotheses, -1 after the last, `[batch, beams, max_tokens]`
    best: Array  # score of the best finished hypothesis, -inf for none, `[batch]`
    finished: Array  # tokens of the best finished hypothesis, -1 after the last, `[batch, max_tokens]`


def search(
    model: Model, settings: Decoding, params: Any, prompt: Array | None, inputs: Any, stops: Array, limits: Array
) -> Array:
    """Generates for a batch; arguments and result are those of `generate.generate`, which compiles this."""
    logits, state = model.prefill(params, prompt, inputs, settings.max_tokens)
    batch, width = len(logits), settings.beams
    limits = jnp.broadcast_to(limits, (batch,))

    def running(beams: Beams) -> Array:
        """Returns bool `[batch]`: whether a row's result may still change."""
        # Log-probabilities only decrease from here, and the penalty is largest at the limit.
        bound = beams.scores[:, 0] / _penalty(limits, settings)
        return (beams.length < limits) & (bound > beams.best) & (inputs["lengths"] > 0)

    def extend(beams: Beams, logits: Array, state: Any) -> tuple[Beams, Array, Any]:
        """Appends one token by logits `[batch * beams, vocab]`; returns the new tokens `[batch * beams]` too."""
        hypotheses, scores, origins, tokens = _candidates(beams, logits, stops)
        stopped = stops[tokens]
        ending = jnp.where(stopped, scores, -jnp.inf) / _penalty(beams.length + 1, settings)
        first = jnp.argmax(ending, axis=1)[:, None]
        best = _take(ending, first)[:, 0]
        scores, kept = jax.lax.top_k(jnp.where(stopped, -jnp.inf, scores), width)
        # A row that is done stays as it is, however long other rows run: no row depends on its neighbours.
        active = running(beams)
        better = active & (best > beams.best)
        beams = Beams(
            beams.length + 1,
            jnp.where(active[:, None], scores, beams.scores),
            jnp.where(active[:, None, None], _take(hypotheses, kept), beams.live),
            jnp.where(better, best, beams.best),
            jnp.where(better[:, None], _take(hypotheses, first)[:, 0], beams.finished),
        )
        state = model.reorder(state, _take(origins, kept))
        return beams, _take(tokens, kept).reshape(-1), state

    def advance(carry: tuple[Beams, Array, Any]) -> tuple[Beams, Array, Any]:
        beams, tokens, state = carry
        logits, state = model.step(params, state, tokens)
        return extend(beams, logits, state)

    beams = Beams(
        jnp.int32(0),
        jnp.full((batch, width), -jnp.inf).at[:, 0].set(0.0),  # all beams are equal: only the first is continued
        jnp.full((batch, width, settings.max_tokens), -1, jnp.int32),
        jnp.full(batch, -jnp.inf),
        jnp.full((batch, settings.max_tokens), -1, jnp.int32),
    )
    state = model.reorder(state, jnp.zeros((batch, width), jnp.int32))
    carry = extend(beams, jnp.repeat(logits, width, axis=0), state)
    beams = jax.lax.while_loop(lambda carry: running(carry[0]).any(), advance, carry)[0]
    return jnp.where((beams.best > -jnp.inf)[:, None], beams.finished, beams.live[:, 0])


def _candidates(beams: Beams, logits: Array, stops: Array) -> tuple[Array, Array, Array, Array]:
    """Returns the `2 * beams` likeliest continuations of each row, likeliest first.

    Args:
        beams: the hypotheses to continue.
        logits: `[batch * beams, vocab]`.
        stops: bool `[vocab]`.

    Returns:
        Tokens of the continued hypotheses `[batch, 2 * beams, max_tokens]`; and, each `[batch, 2 * beams]`, their
        log-probabilities, the beams that they continue, and their last tokens.
    """
    batch, width = beams.scores.shape
    vocab = logits.shape[-1]
    scores = beams.scores[:, :, None] + jax.nn.log_softmax(logits).reshape(batch, width, vocab)
    # Of several stop tokens, each beam keeps its likeliest: at least half of the candidates stay live, as in T5X.
    stop = jnp.argmax(jnp.where(stops, scores, -jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(stops & (jnp.arange(vocab) != stop), -jnp.inf, scores)
    scores, index = jax.lax.top_k(scores.reshape(batch, -1), min(2, vocab) * width)
    origins, tokens = index // vocab, index % vocab
    hypotheses = _take(beams.live, origins).at[:, :, beams.length].set(tokens)
    return hypotheses, scores, origins, tokens


def _penalty(length: Array, settings: Decoding) -> Array:
    """Returns the divisor of a log-probability of `length` tokens."""
    return ((5 + length) / 6) ** settings.length_penalty


def _take(array: Array, index: Array) -> Array:
    """Returns the rows `index` `[batch, m]` of `[batch, n, ...]`: `[batch, m, ...]`."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(array, index)
