"""Decoding with a KV cache, for every family: `prefill`, then `step` until all rows are done.

Greedy and sampled here, beam search in `beam`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax import beam
from promot_jax.errors import UserError
from promot_jax.models import Model

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How outputs are chosen.

    Attributes:
        max_tokens: longest output, the stop token included.
        temperature: 0 is greedy.
        top_k: sample among the so many likeliest tokens; 0 is all.
        top_p: sample among the likeliest tokens that hold this much probability.
        stop: text at which an output ends; it is cut off. An answer of our tasks is one line, so that this default
            saves time and changes no score.
        beams: 1 is greedy or sampled; more are the width of a beam search.
        length_penalty: of beam search: exponent of T5X's brevity penalty `((5 + length) / 6) ** length_penalty`, which
            log-probabilities are divided by.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str = "\n"
    beams: int = 1
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "Decoding needs max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                f"not {self.max_tokens}, {self.temperature}, {self.top_k}, {self.top_p}."
            )
        if self.beams < 1 or not 0 <= self.length_penalty < float("inf"):
            raise UserError(
                f"Decoding needs beams >= 1 and a finite length_penalty >= 0, not {self.beams}, {self.length_penalty}."
            )
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"A beam search does not sample: set Decoding.beams = 1 or Decoding.temperature = 0, not {self.beams} "
                f"and {self.temperature}."
            )


def stop_mask(token_strings: Sequence[str], stop: str, eos_id: int) -> np.ndarray:
    """Returns bool `[vocab]`: the end-of-sequence token, and every token whose text holds the stop text."""
    mask = np.array([bool(stop) and stop in text for text in token_strings])
    mask[eos_id] = True
    return mask


SENTINELS = ("<extra_id_0>", "<extra_id_1>")  # around the first span that span corruption asks for


def spelled(ids: Sequence[int], sentinels: Mapping[str, int], decode: Callable[[list[int]], str]) -> str:
    """Decodes ids with their sentinels spelled out, one space around each; `decode` alone would drop them.

    Args:
        ids: of an output.
        sentinels: `{"<extra_id_0>": id, ...}`.
        decode: ids without sentinels to text.
    """
    names = {index: name for name, index in sentinels.items()}
    parts: list[str] = []
    span: list[int] = []
    for index in ids:
        if index in names:
            parts += [decode(span), names[index]]
            span = []
        else:
            span.append(index)
    return " ".join(part for part in [*parts, decode(span)] if part)


def first_span(output: str) -> str:
    """The answer in a span-corruption output: behind `<extra_id_0>`, if it is there, and before `<extra_id_1>`."""
    _, start, rest = output.partition(SENTINELS[0])
    return (rest if start else output).split(SENTINELS[1], 1)[0].strip()


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
        return beam.search(model, settings, params, prompt, inputs, stops, limits)
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
