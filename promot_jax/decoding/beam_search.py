"""Beam search with a KV cache, for every family, by the rules of T5X.

A hypothesis lives until it takes a stop token. One that has ended scores its log-probability over
`((5 + length) / 6) ** length_penalty` (Wu et al., 2016, section 7), the stop token counted. At each step the likeliest
`2 * beams` continuations are looked at: those that stop have ended, the first `beams` of the others live on. A
hypothesis cut off at its limit counts only where none has ended.

T5X keeps the best `beams` that ended and stops when no living one can beat the worst of them. Ended ones never displace
living ones, and only the best is returned: that one alone is kept, and a row is done once no living one can beat it,
which comes sooner and gives the same result.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from promot_jax.models import Model

if TYPE_CHECKING:
    from promot_jax.decoding.settings import Decoding

Array = jax.Array


class Beams(NamedTuple):
    """Where a search stands.

    Attributes:
        taken: tokens taken so far, the same in every row that still runs.
        scores: log-probabilities of the living hypotheses, likeliest first, -inf for none, `[batch, beams]`.
        living: their tokens, -1 behind the last, `[batch, beams, max_tokens]`.
        best: score of the best hypothesis that has ended, -inf before there is one, `[batch]`.
        ended: its tokens, -1 behind the last, `[batch, max_tokens]`.
    """

    taken: Array
    scores: Array
    living: Array
    best: Array
    ended: Array


def search(
    model: Model, settings: "Decoding", params: Any, prompt: Array | None, inputs: Any, stops: Array, limits: Array
) -> Array:
    """Decodes a batch: arguments and result are those of `decoding.generate`, which compiles it."""
    logits, state = model.prefill(params, prompt, inputs, settings.max_tokens)
    batch, width = len(logits), settings.beams
    limits = jnp.broadcast_to(limits, (batch,))

    def running(beams: Beams) -> Array:
        """Rows `[batch]` whose result may still change."""
        # Log-probabilities only fall from here, and the penalty is at its highest.
        bound = beams.scores[:, 0] / _penalty(limits, settings)
        return (beams.taken < limits) & (bound > beams.best) & (inputs["lengths"] > 0)

    def extend(beams: Beams, logits: Array, state: Any) -> tuple[Beams, Array, Any]:
        """Takes one token more, by logits `[batch * beams, vocab]`; returns the last tokens `[batch * beams]` too."""
        whole, scores, origins, tokens = _candidates(beams, logits, stops)
        stopped = stops[tokens]
        ending = jnp.where(stopped, scores, -jnp.inf) / _penalty(beams.taken + 1, settings)
        first = jnp.argmax(ending, axis=1)[:, None]
        best = _take(ending, first)[:, 0]
        scores, kept = jax.lax.top_k(jnp.where(stopped, -jnp.inf, scores), width)
        # A row that is done stays as it is, however long the others take: no row depends on its neighbours.
        active = running(beams)
        better = active & (best > beams.best)
        beams = Beams(
            beams.taken + 1,
            jnp.where(active[:, None], scores, beams.scores),
            jnp.where(active[:, None, None], _take(whole, kept), beams.living),
            jnp.where(better, best, beams.best),
            jnp.where(better[:, None], _take(whole, first)[:, 0], beams.ended),
        )
        state = model.reorder(state, _take(origins, kept))
        return beams, _take(tokens, kept).reshape(-1), state

    def advance(carry: tuple[Beams, Array, Any]) -> tuple[Beams, Array, Any]:
        beams, tokens, state = carry
        logits, state = model.step(params, state, tokens)
        return extend(beams, logits, state)

    beams = Beams(
        jnp.int32(0),
        jnp.full((batch, width), -jnp.inf).at[:, 0].set(0.0),  # all beams are equal: the first alone has continuations
        jnp.full((batch, width, settings.max_tokens), -1, jnp.int32),
        jnp.full(batch, -jnp.inf),
        jnp.full((batch, settings.max_tokens), -1, jnp.int32),
    )
    state = model.reorder(state, jnp.zeros((batch, width), jnp.int32))
    carry = extend(beams, jnp.repeat(logits, width, axis=0), state)
    beams = jax.lax.while_loop(lambda carry: running(carry[0]).any(), advance, carry)[0]
    return jnp.where((beams.best > -jnp.inf)[:, None], beams.ended, beams.living[:, 0])


def _candidates(beams: Beams, logits: Array, stops: Array) -> tuple[Array, Array, Array, Array]:
    """The likeliest `2 * beams` continuations of each row, likeliest first.

    Args:
        beams: what is continued.
        logits: `[batch * beams, vocab]`.
        stops: bool `[vocab]`.

    Returns:
        Tokens of the whole hypotheses `[batch, 2 * beams, max_tokens]`; their log-probabilities, the beams they
        continue and their last tokens, `[batch, 2 * beams]`.
    """
    batch, width = beams.scores.shape
    vocab = logits.shape[-1]
    scores = beams.scores[:, :, None] + jax.nn.log_softmax(logits).reshape(batch, width, vocab)
    # Several tokens may stop: each beam's likeliest does. Then half of the candidates at least go on, as in T5X.
    stop = jnp.argmax(jnp.where(stops, scores, -jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(stops & (jnp.arange(vocab) != stop), -jnp.inf, scores)
    scores, index = jax.lax.top_k(scores.reshape(batch, -1), min(2, vocab) * width)
    origins, tokens = index // vocab, index % vocab
    whole = _take(beams.living, origins).at[:, :, beams.taken].set(tokens)
    return whole, scores, origins, tokens


def _penalty(length: Array, settings: "Decoding") -> Array:
    """What the log-probability of so many tokens is divided by."""
    return ((5 + length) / 6) ** settings.length_penalty


def _take(array: Array, index: Array) -> Array:
    """Rows of `[batch, n, ...]` by index `[batch, m]`."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(array, index)
