"""Choosing tokens against distributions worked out by hand; limits, stops, padding, and no compilation per batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data import batches
from promot_jax.decoding import generate as decoding
from promot_jax.decoding import output_text
from promot_jax.decoding.generate import choose
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation import sampler as sampler_module
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.evaluation.settings import Evaluation
from promot_jax.models import DecoderConfig, build

VOCAB, EMBED, PROMPT = 40, 16, 3
MODEL = build(DecoderConfig(VOCAB, EMBED, 2, 1, 2, 8, 24))
SETTINGS = Decoding(max_tokens=8, stop="")
DRAWS = 20_000
# Tokens out of order, so that a mask put back in sorted order would show.
CHANCES = np.array([0.15, 0.5, 0.05, 0.3])


@pytest.fixture(name="params", scope="module")
def _params():
    noise = np.random.default_rng(0)
    shapes = {"model": jax.eval_shape(MODEL.init, jax.random.key(0))}
    shapes["prompt"] = {"task": jax.ShapeDtypeStruct((PROMPT, EMBED), np.float32)}
    return Partitioner().place(jax.tree.map(lambda x: noise.normal(0, 0.5, x.shape).astype(np.float32), shapes))


# ---- choose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Decoding(temperature=1.0), [0.15, 0.5, 0.05, 0.3]),
        (Decoding(temperature=0.5), [0.0225, 0.25, 0.0025, 0.09]),  # squares
        (Decoding(temperature=2.0), [0.3873, 0.7071, 0.2236, 0.5477]),  # roots
        (Decoding(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (Decoding(temperature=1.0, top_k=2), [0, 0.5, 0, 0.3]),
        (Decoding(temperature=1.0, top_k=3), [0.15, 0.5, 0, 0.3]),
        (Decoding(temperature=1.0, top_k=99), [0.15, 0.5, 0.05, 0.3]),
        (Decoding(temperature=1.0, top_p=0.01), [0, 1, 0, 0]),  # the likeliest always stays
        (Decoding(temperature=1.0, top_p=0.45), [0, 1, 0, 0]),
        (Decoding(temperature=1.0, top_p=0.6), [0, 0.5, 0, 0.3]),
        (Decoding(temperature=1.0, top_p=0.85), [0.15, 0.5, 0, 0.3]),
        (Decoding(temperature=1.0, top_p=0.99), [0.15, 0.5, 0.05, 0.3]),
        # Among the first three 0.5 is a probability of 0.526, and among squares one of 0.685.
        (Decoding(temperature=1.0, top_k=3, top_p=0.51), [0, 1, 0, 0]),
        (Decoding(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),
        (Decoding(temperature=0.5, top_k=3, top_p=0.7), [0, 0.25, 0, 0.09]),
    ],
)
def test_sampling_by_hand(settings, expected):
    logits = jnp.log(jnp.asarray(CHANCES)) + 7
    tokens = choose(jnp.tile(logits, (DRAWS, 1)), settings, jax.random.split(jax.random.key(0), DRAWS))
    shares = np.bincount(tokens, minlength=4) / DRAWS
    expected = np.array(expected) / np.sum(expected)

    assert tokens.dtype == jnp.int32
    assert (shares[expected == 0] == 0).all()
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / DRAWS**0.5)  # 5 standard deviations


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.3), (1.0, 0, 0.9), (1.0, 0, 0.999), (1.5, 20, 0.8), (0.3, 20, 0.95)],
)
def test_tokens_left_out_are_those_that_transformers_leaves_out(temperature, top_k, top_p):
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(0, 3, (200, VOCAB)).astype(np.float32)
    theirs = logits_process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        theirs = logits_process.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = logits_process.TopPLogitsWarper(top_p)(None, theirs)
    ours = np.asarray(decoding.warp(logits, Decoding(temperature=temperature, top_k=top_k, top_p=top_p)))

    left_out = np.isinf(ours)
    assert np.array_equal(left_out, np.isinf(theirs.numpy())) and left_out.any() == (top_k > 0 or top_p < 1)
    assert (left_out.sum(axis=1) < VOCAB).all()
    np.testing.assert_allclose(ours[~left_out], theirs.numpy()[~left_out], rtol=1e-6)


def test_rows_are_masked_each_by_their_own_logits():
    rows = jnp.log(jnp.stack([jnp.array([0.6, 0.3, 0.1]), jnp.array([0.1, 0.3, 0.6])]))
    for settings in (Decoding(temperature=1.0, top_k=1), Decoding(temperature=1.0, top_p=0.5), Decoding()):
        assert choose(rows, settings, jax.random.split(jax.random.key(0))).tolist() == [0, 2]


def test_greedy_takes_the_first_of_equals_and_no_key():
    logits = jnp.array([[1.0, 5.0, 5.0], [2.0, 1.0, 0.0]])

    for seed in range(3):
        assert choose(logits, Decoding(), jax.random.split(jax.random.key(seed))).tolist() == [1, 0]


@pytest.mark.parametrize(
    "change", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 2}]
)
def test_settings_out_of_range(change):
    with pytest.raises(UserError, match="Decoding needs max_tokens >= 1"):
        Decoding(**change)


def test_stop_mask():
    strings = ["<eos>", "a", "\n", "b\nc", ""]

    assert output_text.stop_mask(strings, "\n", 0).tolist() == [True, False, True, True, False]
    assert output_text.stop_mask(strings, "", 1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<extra_id_0> good <extra_id_1> film", "good"),
        ("<extra_id_0>good", "good"),  # cut by its limit
        ("so <extra_id_0> good", "good"),
        ("good <extra_id_1> film", "good"),
        ("<extra_id_0> <extra_id_1> film", ""),
        ("<extra_id_1> film <extra_id_0> good", "good"),
        ("<extra_id_0> a <extra_id_0> b <extra_id_1>", "a <extra_id_0> b"),
        (" good ", "good"),
        ("", ""),
    ],
)
def test_the_first_span_of_a_span_corruption_output(output, answer):
    assert output_text.first_span(output) == answer


def test_sentinels_are_spelled_out():
    def spelled(*ids):
        return output_text.spelled(ids, {"<extra_id_0>": 9, "<extra_id_1>": 8}, lambda span: "".join(map(str, span)))

    assert spelled(9, 1, 2, 8, 3) == "<extra_id_0> 12 <extra_id_1> 3"
    assert spelled(1, 2) == "12" and spelled(9, 8) == "<extra_id_0> <extra_id_1>" and spelled() == ""


# ---- generate --------------------------------------------------------------------------------------------------------


def inputs(seed=0, rows=4, width=32):
    noise = np.random.default_rng(seed)
    lengths = noise.integers(1, width, rows).astype(np.int32)
    return {"tokens": noise.integers(0, VOCAB, (rows, width)).astype(np.int32), "lengths": lengths}


def generate(params, batch, limit=8, settings=SETTINGS, stops=(), seed=0):
    mask = np.isin(np.arange(VOCAB), stops)
    limits = np.broadcast_to(np.int32(limit), batch["lengths"].shape)
    placed, key = Partitioner().batch(batch), jax.random.key(seed)
    return np.array(decoding.generate(MODEL, settings, params["model"], None, placed, mask, limits, key))


def test_limits_cut_and_change_nothing_else(params):
    whole = generate(params, inputs())

    assert (whole >= 0).all() and (whole < VOCAB).all()
    for limit in (1, 2, 5, 8):
        out = generate(params, inputs(), limit)
        assert np.array_equal(out[:, :limit], whole[:, :limit]) and (out[:, limit:] == -1).all()
    limited = generate(params, inputs(), [3, 8, 1, 5])
    assert limited.tolist() == [
        [*row[:n], *[-1] * (8 - n)] for n, row in zip([3, 8, 1, 5], whole.tolist(), strict=True)
    ]


def test_padding_rows_stay_empty_and_keep_nothing_running(params):
    batch = inputs()
    whole = generate(params, batch)
    batch["lengths"] = batch["lengths"].copy()
    batch["lengths"][[1, 3]] = 0
    out = generate(params, batch)

    assert (out[[1, 3]] == -1).all() and np.array_equal(out[[0, 2]], whole[[0, 2]])
    # Both real rows stop at once: nothing more is written, though the others never would.
    out = generate(params, batch, stops=whole[[0, 2], 0])
    assert (out[:, 1:] == -1).all() and np.array_equal(out[[0, 2], 0], whole[[0, 2], 0])


def test_what_lies_in_the_padding_does_not_matter(params):
    batch = inputs()
    other = batch["tokens"].copy()
    for row, length in enumerate(batch["lengths"]):
        other[row, length:] = 7

    assert np.array_equal(generate(params, batch), generate(params, batch | {"tokens": other}))


def test_sampling_is_a_function_of_the_key(params):
    settings = Decoding(max_tokens=8, temperature=1.0)
    first, again, other = (generate(params, inputs(), settings=settings, seed=seed) for seed in (0, 0, 1))

    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first[:, 0], first[:, 1])  # a key of its own for every step


def test_nothing_recompiles_within_a_bucket(params):
    noise = np.random.default_rng(0)
    generate(params, inputs())
    before = decoding.generate._cache_size()
    for round_ in range(5):
        texts = [noise.integers(0, VOCAB, noise.integers(25, 33)).tolist() for _ in range(6)]
        for _, batch in batches.buckets(texts, 128):  # the second batch is half padding
            generate(params, batch, limit=1 + round_, stops=[round_], seed=round_)
    assert decoding.generate._cache_size() == before

    generate(params, inputs(rows=2), limit=1)
    assert decoding.generate._cache_size() == before + 1  # the counter counts


# ---- strip -----------------------------------------------------------------------------------------------------------


class Letters:
    """A vocabulary of one token per character."""

    eos_id, bos_id, add_bos = 0, None, False

    def token_strings(self):
        return ["", *(chr(ord("A") + i) for i in range(VOCAB - 1))]

    def encode(self, text):
        return [ord(letter) - ord("A") + 1 for letter in text]

    def decode(self, ids):
        return "".join(self.token_strings()[i] for i in ids)


def test_the_sampler_strips_by_leaving_the_ids_out(params, monkeypatch):
    tables = []

    def spy(engine, inputs):
        tables.append(None if engine.table is None else engine.table.shape)
        return generate_all(engine, inputs)

    generate_all = sampler_module.generate_all
    monkeypatch.setattr(sampler_module, "generate_all", spy)
    settings = dataclasses.replace(Evaluation(), tokens_per_batch=128, decoding=SETTINGS)
    base = Pretrained(MODEL, params["model"], Letters(), base="", fingerprint="", path="", leaves={})
    sampler = Sampler(base, settings, Partitioner())
    texts = ["ABC", "HELLO", "A", "XYZZY", "PROMPT"]

    plain = sampler.ask({"model": params["model"]}, [Request(text) for text in texts])
    stripped = sampler.ask(params, [Request(text) for text in texts])
    assert stripped == plain and set(tables) == {None}
    mixed = sampler.ask(params, [Request(text, "task" if i % 2 else "") for i, text in enumerate(texts)])
    assert tables[-1] == (PROMPT, EMBED)
    assert mixed[::2] == plain[::2] and mixed[1] != plain[1] and mixed[3] != plain[3]
    limited = sampler.ask(params, [Request(text, limit=1 + i) for i, text in enumerate(texts)])
    assert limited == [text[: 1 + i] for i, text in enumerate(plain)]
    with pytest.raises(UserError, match="no soft prompt called 'other'"):
        sampler.ask(params, [Request("A", "other")])
