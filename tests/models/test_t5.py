"""The T5 family: prompts, packing, decoding, names. test_parity.py compares its numbers with PyTorch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits

from promot_jax import trees
from promot_jax.decoding import generate as generate_module
from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError
from promot_jax.models import T5Config, build
from promot_jax.models.batch_layout import Tokens, encoder_decoder_rows
from promot_jax.models.relative_position import buckets
from promot_jax.training import losses

CONFIGS = {
    "T5 1.0": T5Config(61, 32, 4, 2, 2, 8, 48, ("relu",), tied_embeddings=True),
    "T5 1.1": T5Config(64, 32, 4, 2, 2, 8, 40),
    "mT5": T5Config(97, 32, 6, 2, 2, 8, 56, relative_buckets=8, relative_max_distance=12),
    "ByT5": T5Config(80, 24, 3, 3, 1, 8, 40, norm_eps=1e-5),
}
INPUTS, TARGETS, PROMPT = 26, 7, 4
ROWS, ATTACHED = 6, 2


def make_params(model):
    """Random parameters, norms included, of sizes with which outputs hang on all layers and on the inputs."""
    noise = np.random.default_rng(0)
    params = {}
    for path, leaf in trees.flatten(jax.eval_shape(model.init, jax.random.key(0))).items():
        size = 1.5 * leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.5
        params[path] = noise.normal(path.endswith("scale"), size, leaf.shape).astype(np.float32)
    return trees.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})


@pytest.fixture(scope="module", name="plain")
def _plain():
    """A model with random parameters."""
    model = build(CONFIGS["mT5"])
    return model, make_params(model)


def sequences(vocab, count=ROWS, low=1, high=INPUTS - PROMPT):
    noise = np.random.default_rng(1)
    return [
        Tokens(
            noise.integers(0, vocab, noise.integers(low, high)).tolist(),
            noise.integers(0, vocab, noise.integers(1, TARGETS + 1)).tolist(),
        )
        for _ in range(count)
    ]


def prepend(prompt_ids, sequence):
    return Tokens([*prompt_ids, *sequence.inputs], sequence.targets)


def attached(model, rows):
    vocab = model.config.vocab_size
    return [*rows[:-ATTACHED], *(prepend(range(vocab, vocab + PROMPT), row) for row in rows[-ATTACHED:])]


def prompts_of(model):
    return jnp.asarray(np.random.default_rng(2).normal(size=(PROMPT, model.config.emb_dim)), jnp.float32)


def logits_of(model, params, prompt, rows, inputs=INPUTS, targets=TARGETS):
    """Logits of every sequence, at its targets only; `rows` are sequences, or lists of them to pack."""
    rows = [row if isinstance(row, list) else [row] for row in rows]
    empty = [[]] * (ROWS - len(rows))  # one shape, compiled once
    logits = np.asarray(target_logits(model, params, prompt, model.layout(rows + empty, inputs, targets)))
    ends = [np.cumsum([len(sequence.targets) for sequence in row]) for row in rows]
    return [
        logits[i, end - len(sequence.targets) : end]
        for i, row in enumerate(rows)
        for sequence, end in zip(row, ends[i], strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def _measured(model, params, prompt, batch, key=None):
    """Logits, and the gradients of the loss in parameters and prompt."""

    def loss(params, prompt):
        logits = target_logits(model, params, prompt, batch, key)
        return losses.cross_entropy(logits, batch["targets"], batch["weights"], 0.0), logits

    gradients, logits = jax.grad(loss, (0, 1), has_aux=True)(params, prompt)
    return logits, gradients


def assert_close(ours, theirs, tolerance=1e-4, name=""):
    np.testing.assert_allclose(ours, theirs, tolerance, tolerance * np.abs(theirs).max(), err_msg=name)


def batch_of(rows):
    """Inputs padded to one width."""
    tokens = np.zeros((len(rows), INPUTS + 2), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}


def generate(model, params, prompt, rows, steps=8):
    """Greedy ids `[rows, steps]` of inputs that share one padded batch."""
    stops, limits = np.zeros(model.config.vocab_size, bool), np.full(len(rows), steps, np.int32)
    settings, key = Decoding(max_tokens=steps), jax.random.key(0)
    return np.asarray(generate_module.generate(model, settings, params, prompt, batch_of(rows), stops, limits, key))


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_agree_with_pytorch(count, farthest):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    distance = np.arange(-farthest - 50, farthest + 51)
    for both in (True, False):
        expected = theirs(torch.tensor(distance), both, count, farthest).numpy()
        ours = buckets(count, farthest, both)[np.clip(distance, -farthest, farthest) + farthest]
        assert ours.tolist() == expected.tolist()


# ---- prompts, packing, decoding --------------------------------------------------------------------------------------


def mixed(model):
    """Sequences of task A, task B, and of none, whose prompts share a table."""
    vocab, half = model.config.vocab_size, PROMPT // 2
    first, second, third = sequences(vocab, count=3)
    prompted = prepend(range(vocab, vocab + half), first), prepend(range(vocab + half, vocab + PROMPT), second)
    return [prompted[0], third, prompted[1]]


def test_packed_rows_equal_unpacked(plain):
    model, params = plain
    prompt, rows = prompts_of(model), mixed(model)
    alone = logits_of(model, params, prompt, rows)
    packed = logits_of(model, params, prompt, [rows], 3 * INPUTS, 3 * TARGETS)
    for ours, theirs in zip(packed, alone, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_mixed_batch_gives_each_row_its_logits_alone(plain):
    model, params = plain
    prompt, rows = prompts_of(model), mixed(model)
    together = logits_of(model, params, prompt, rows)
    for row, ours in zip(rows, together, strict=True):
        table = prompt if row.inputs[0] >= model.config.vocab_size else None
        assert_close(ours, logits_of(model, params, table, [row])[0], 1e-5)


def test_stripped_is_plain_bit_for_bit(plain):
    model, params = plain
    rows = sequences(model.config.vocab_size)
    stripped = logits_of(model, params, prompts_of(model), rows)
    for ours, theirs in zip(stripped, logits_of(model, params, None, rows), strict=True):
        assert np.array_equal(ours, theirs)


def test_decoding_with_prompts_equals_teacher_forcing(plain):
    model, params = plain
    prompt, rows = prompts_of(model), mixed(model)
    out = generate(model, params, prompt, [row.inputs for row in rows], steps=TARGETS)
    continued = [Tokens(row.inputs, ids.tolist()) for row, ids in zip(rows, out, strict=True)]
    for ids, logits in zip(out, logits_of(model, params, prompt, continued), strict=True):
        assert np.argmax(logits, -1).tolist() == ids.tolist()


def test_reordered_rows_go_on_as_they_would_have(plain):
    model, params = plain
    inputs = batch_of([row.inputs for row in sequences(model.config.vocab_size, count=3)])
    step = jax.jit(model.step)
    _, state = jax.jit(model.prefill, static_argnums=3)(params, None, inputs, 4)
    _, state = step(params, state, jnp.array([5, 6, 7]))
    expected, _ = step(params, state, jnp.array([8, 9, 10]))
    order = jnp.array([2, 0, 0, 1, 2])  # the batch grows
    logits, after = step(params, model.reorder(state, order[None]), jnp.array([10, 8, 8, 9, 10]))
    np.testing.assert_allclose(logits, expected[order], rtol=1e-5, atol=1e-5)
    assert int(after["cursor"]) == 3 and after["cross"]["key"].shape[1] == 5


# ---- dropout, memory, precision, errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_dropout_is_on_with_a_key_only_and_the_same_when_recomputed(plain, remat):
    model, params = plain
    dropping, again = (
        build(dataclasses.replace(model.config, dropout_rate=0.3, remat=policy)) for policy in ("none", remat)
    )
    rows, prompt = sequences(model.config.vocab_size), prompts_of(model)
    for ours, theirs in zip(*(logits_of(variant, params, prompt, rows) for variant in (dropping, model)), strict=True):
        assert np.array_equal(ours, theirs)

    batch = model.layout([[row] for row in attached(model, rows)], INPUTS, TARGETS)
    logits, gradients = _measured(dropping, params, prompt, batch, jax.random.key(0))
    with_other_key, _ = _measured(dropping, params, prompt, batch, jax.random.key(1))
    assert not np.allclose(logits, with_other_key, atol=0.1)
    recomputed, same = _measured(again, params, prompt, batch, jax.random.key(0))
    assert_close(recomputed, np.asarray(logits))
    jax.tree.map(lambda ours, theirs: assert_close(ours, np.asarray(theirs), 1e-3), same, gradients)


def test_bfloat16_stays_close_and_gives_float32_logits(plain):
    model, params = plain
    rows, prompt = sequences(model.config.vocab_size), prompts_of(model)
    half = build(dataclasses.replace(model.config, dtype="bfloat16"))
    exact, rounded = (np.concatenate(logits_of(one, params, prompt, rows)) for one in (model, half))
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).mean() < 0.1 * np.abs(exact).mean()


def test_parameters_are_named_as_in_t5x():
    shapes = {name: jax.eval_shape(build(config).init, jax.random.key(0)) for name, config in CONFIGS.items()}
    leaf_shapes = {
        name: {path: leaf.shape for path, leaf in trees.flatten(tree).items()} for name, tree in shapes.items()
    }
    assert leaf_shapes["ByT5"] == {
        "token_embedder/embedding": (80, 24),
        "encoder/relpos_bias/rel_embedding": (3, 32),
        "encoder/encoder_norm/scale": (24,),
        "encoder/layers/pre_attention_layer_norm/scale": (3, 24),
        "encoder/layers/pre_mlp_layer_norm/scale": (3, 24),
        **{f"encoder/layers/attention/{name}/kernel": (3, 24, 24) for name in ("query", "key", "value", "out")},
        "encoder/layers/mlp/wi_0/kernel": (3, 24, 40),
        "encoder/layers/mlp/wi_1/kernel": (3, 24, 40),
        "encoder/layers/mlp/wo/kernel": (3, 40, 24),
        "decoder/relpos_bias/rel_embedding": (3, 32),
        "decoder/decoder_norm/scale": (24,),
        "decoder/logits_dense/kernel": (24, 80),
        "decoder/layers/pre_self_attention_layer_norm/scale": (1, 24),
        "decoder/layers/pre_cross_attention_layer_norm/scale": (1, 24),
        "decoder/layers/pre_mlp_layer_norm/scale": (1, 24),
        **{
            f"decoder/layers/{kind}/{name}/kernel": (1, 24, 24)
            for kind in ("self_attention", "encoder_decoder_attention")
            for name in ("query", "key", "value", "out")
        },
        "decoder/layers/mlp/wi_0/kernel": (1, 24, 40),
        "decoder/layers/mlp/wi_1/kernel": (1, 24, 40),
        "decoder/layers/mlp/wo/kernel": (1, 40, 24),
    }
    assert leaf_shapes["T5 1.0"]["encoder/layers/mlp/wi/kernel"] == (2, 32, 48)
    assert "decoder/logits_dense/kernel" not in leaf_shapes["T5 1.0"]


def test_a_row_by_hand():
    batch = encoder_decoder_rows([[Tokens([90, 5, 1], [7, 8, 1]), Tokens([9, 1], [1])], []], 6, 5)
    expected = {
        "tokens": [90, 5, 1, 9, 1, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_tokens": [0, 7, 8, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 0],
        "targets": [7, 8, 1, 1, 0],
        "weights": [1, 1, 1, 1, 0],
    }
    assert {name: array[0].tolist() for name, array in batch.items()} == expected
    assert not any(array[1].any() for array in batch.values())
    assert {name for name, array in batch.items() if array.dtype != np.int32} == {"weights"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_activations": ("swish",)}, "use one or two of"),
        ({"mlp_activations": ()}, "use one or two of"),
        ({"relative_buckets": 6}, "multiple of 4"),
        ({"relative_max_distance": 16}, "relative_max_distance is 16"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_config_refuses_what_cannot_be_built(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIGS["T5 1.1"], **change)
