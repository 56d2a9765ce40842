"""Beam search against all sequences there are, and against a plain one (with PyTorch's models: test_parity.py)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import plain_beam
import pytest
from forward import target_logits

from promot_jax.decoding import generate as decoding
from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build
from promot_jax.models.batch_layout import Tokens, decoder_rows

VOCAB, EMBED, PROMPT, STEPS, WIDTH = 13, 16, 3, 8, 16
MODEL = build(DecoderConfig(VOCAB, EMBED, 2, 1, 2, 8, 24))
BEAMS = Decoding(max_tokens=STEPS, beams=4)
STOP = 5


def make_params(model, seed):
    """Weights large enough that some tokens are much likelier than others."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.6, x.shape), jnp.float32), shapes)


PARAMS = make_params(MODEL, 0)


def as_batch(rows, width=WIDTH):
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}


def make_rows(count, seed=1, vocab=VOCAB):
    noise = np.random.default_rng(seed)
    return [noise.integers(0, vocab, noise.integers(1, WIDTH - PROMPT)).tolist() for _ in range(count)]


def generate(rows, settings=BEAMS, *, stops=(STOP,), limits=None, params=PARAMS, prompt=None, model=MODEL):
    """Outputs up to their ends."""
    mask = np.isin(np.arange(model.config.vocab_size), stops)
    limits = np.broadcast_to(np.int32(settings.max_tokens if limits is None else limits), len(rows))
    out = decoding.generate(model, settings, params, prompt, as_batch(rows), mask, limits, jax.random.key(0))
    assert out.dtype == jnp.int32 and out.shape == (len(rows), settings.max_tokens)
    outputs = [[token for token in row if token >= 0] for row in out.tolist()]
    assert out.tolist() == [row + [-1] * (settings.max_tokens - len(row)) for row in outputs]
    return outputs


@jax.jit
def next_logits(params, inputs):
    return MODEL.prefill(params, None, inputs, 0)[0]


# ---- against all sequences -------------------------------------------------------------------------------------------

SMALL = build(dataclasses.replace(MODEL.config, vocab_size=7))
ALL = np.array(list(itertools.product(range(7), repeat=4)))


@jax.jit
def sequence_log_probs(params, batch):
    log_probs = jax.nn.log_softmax(target_logits(SMALL, params, None, batch))
    return jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]


def by_enumeration(params, row, stops):
    """The best sequence of at most 4 tokens; one that does not stop counts only if none does."""
    batch = decoder_rows([[Tokens(row, sequence.tolist())] for sequence in ALL], WIDTH, 4)
    totals = np.asarray(sequence_log_probs(params, batch)).cumsum(axis=1)
    stopped = np.isin(ALL, stops)
    if not stops:
        return ALL[totals[:, -1].argmax()].tolist()
    lengths = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, 0)
    scores = np.take_along_axis(totals, lengths[:, None] - 1, axis=1)[:, 0] / plain_beam.penalty(lengths, 0.6)
    best = np.where(lengths > 0, scores, -np.inf).argmax()
    return ALL[best, : lengths[best]].tolist()


@pytest.mark.parametrize("stops", [(0,), (0, 3, 4), ()])
def test_wide_enough_a_search_finds_the_best_of_all(stops):
    rows = make_rows(4, vocab=7)
    settings = Decoding(max_tokens=4, beams=1201)  # 2 * 1201 > 7 ** 4
    lengths = set()
    for seed in range(3):
        params = make_params(SMALL, seed)
        outputs = generate(rows, settings, stops=stops, params=params, model=SMALL)
        assert outputs == [by_enumeration(params, row, stops) for row in rows]
        lengths |= {len(row) for row in outputs}
    assert lengths == {4} if not stops else len(lengths) > 1


# ---- against a plain search ------------------------------------------------------------------------------------------


def plain_search(rows, settings=BEAMS, limits=STEPS):
    """Everything computed anew."""
    limits = np.broadcast_to(limits, len(rows)).tolist()

    def score(hypotheses):
        inputs = [[*rows[i], *tokens] for i, tokens in hypotheses]
        padded = inputs + [[0]] * (len(rows) * settings.beams - len(inputs))  # one shape, compiled once
        return np.asarray(jax.nn.log_softmax(next_logits(PARAMS, as_batch(padded, WIDTH + STEPS))))[: len(inputs)]

    return plain_beam.side_by_side([plain_beam.search(settings, limit, STOP) for limit in limits], score)


@pytest.fixture(name="searched", scope="module")
def _searched():
    """100 inputs and their outputs at width 4."""
    rows = make_rows(100)
    return rows, generate(rows)


def test_width_4_equals_a_plain_search(searched):
    rows, outputs = searched
    assert outputs == plain_search(rows)
    lengths = [len(row) for row in outputs]
    assert len(set(lengths)) >= 5 and outputs != generate(rows, Decoding(max_tokens=STEPS))


def test_a_higher_penalty_favours_longer_outputs(searched):
    rows, outputs = searched
    settings = dataclasses.replace(BEAMS, length_penalty=3.0)
    out = generate(rows, settings)
    assert out == plain_search(rows, settings)
    assert sum(map(len, out)) > 1.2 * sum(map(len, outputs))


def score(rows, outputs):
    """Log-probability of each output after its input."""
    batch = decoder_rows([[Tokens(row, out)] for row, out in zip(rows, outputs, strict=True)], WIDTH + STEPS, STEPS)
    log_probs = jax.nn.log_softmax(functools.partial(target_logits, MODEL)(PARAMS, None, batch))
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return np.asarray((picked * batch["weights"]).sum(axis=1))


def test_a_beam_search_scores_no_less_than_greedy_decoding(searched):
    """No law, for the greedy output may fall off the beam: it holds on these 100 inputs."""
    rows, _ = searched
    beams, greedy = (generate(rows, dataclasses.replace(BEAMS, beams=beams), stops=()) for beams in (4, 1))
    gain = score(rows, beams) - score(rows, greedy)
    assert (gain > -1e-5).all() and (gain > 0.01).sum() > 20


# ---- rows of a batch -------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_neighbours(searched):
    rows, outputs = searched
    noise = np.random.default_rng(2)
    prompt = jnp.asarray(noise.normal(size=(PROMPT, EMBED)), jnp.float32)
    virtual = list(range(VOCAB, VOCAB + PROMPT))
    mixed = [[*virtual, *row] if i % 2 else row for i, row in enumerate(rows[:10])]
    together = generate([*mixed, [], []], prompt=prompt)
    assert together[:10] == [generate([row], prompt=prompt)[0] for row in mixed]
    assert together[:10:2] == outputs[:10:2] and together[1:10:2] != outputs[1:10:2]
    assert together[10:] == [[], []]  # padding


def test_limits_are_those_of_the_row(searched):
    rows, outputs = searched
    limits = [1 + i % STEPS for i in range(100)]
    limited = generate(rows, limits=limits)
    assert all(len(row) <= limit for row, limit in zip(limited, limits, strict=True)) and limited != outputs
    assert limited[2::STEPS] == generate(rows, dataclasses.replace(BEAMS, max_tokens=3))[2::STEPS]
    assert limited[7::STEPS] == outputs[7::STEPS]
    assert limited == plain_search(rows, limits=limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "Decoding needs beams >= 1"),
        ({"length_penalty": -0.1}, "a finite length_penalty >= 0"),
        ({"length_penalty": float("inf")}, "a finite length_penalty >= 0"),
        ({"length_penalty": float("nan")}, "a finite length_penalty >= 0"),
        ({"temperature": 0.5}, r"set Decoding.beams = 1 or Decoding.temperature = 0, not 4 and 0.5\."),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BEAMS, **change)
