"""The decoder: prompts, packing, decoding, precision. test_parity.py compares its numbers with PyTorch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits

from promot_jax import trees
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build, layers
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.models.layers import Embed

CONFIGS = {
    "grouped, tied": DecoderConfig(97, 48, 6, 2, 3, 8, 80, rope_theta=1e5),
    "untied, wide heads": DecoderConfig(61, 32, 4, 4, 2, 16, 40, tied_embeddings=False, norm_eps=1e-6),
}


@pytest.fixture(params=CONFIGS, scope="module", name="case")
def _case(request):
    """A model with random parameters, norms included."""
    config = CONFIGS[request.param]
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    noise = np.random.default_rng(0)
    flat = {
        path: np.asarray(leaf) + noise.normal(size=leaf.shape).astype(np.float32) * 0.1
        for path, leaf in trees.flatten(params).items()
    }
    return model, trees.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def _batch(rows, length, targets=6):
    """Every row as one sequence whose last tokens are the targets."""
    return decoder_rows([[Tokens(row[:-targets], row[-targets:])] for row in rows], length, targets)


def _rows(vocab, count=5, low=8, high=20):
    noise = np.random.default_rng(1)
    return [noise.integers(0, vocab, noise.integers(low, high)).tolist() for _ in range(count)]


def _generate(model, params, prompt, rows, steps=10, stops=None):
    width = max(map(len, rows)) + 3
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    stops = np.zeros(model.config.vocab_size, bool) if stops is None else stops
    settings = Decoding(max_tokens=steps)
    out = generate(model, settings, params, prompt, inputs, stops, np.int32(steps), jax.random.key(0))
    return np.asarray(out)


def test_decoding_with_a_prompt_equals_teacher_forcing(case):
    model, params = case
    vocab = model.config.vocab_size
    prompt = jnp.asarray(np.random.default_rng(3).normal(size=(4, model.config.emb_dim)), jnp.float32)
    rows = [[*range(vocab, vocab + 4), *row] for row in _rows(vocab, count=3)] + _rows(vocab, count=2)
    out = _generate(model, params, prompt, rows)
    for row, tokens in zip(rows, out, strict=True):
        logits = target_logits(model, params, prompt, _batch([[*row, *tokens.tolist()]], 40, targets=10))
        assert jnp.argmax(logits[0], -1).tolist() == tokens.tolist()


def test_the_gradient_of_a_table_in_bfloat16_is_summed_in_float32():
    """In bfloat16, a sum of ones stops at 256."""
    layer = Embed(8, 2)
    ids = jnp.zeros((16, 256), jnp.int32).at[0, 0].set(3)

    def total(dtype):
        variables = {"params": {"embedding": jnp.ones((8, 2), dtype)}}
        return jax.grad(lambda tree: layer.apply(tree, ids, None, jnp.bfloat16).astype(jnp.float32).sum())(variables)

    for dtype in (jnp.float32, jnp.bfloat16):
        gradient = total(dtype)["params"]["embedding"]
        assert gradient.dtype == dtype
        assert gradient[:, 0].tolist() == [4096 if dtype == jnp.bfloat16 else 4095, 0, 0, 1, 0, 0, 0, 0]


def test_mixed_batch_gives_each_row_its_logits_alone(case):
    model, params = case
    vocab = model.config.vocab_size
    prompt = jnp.asarray(np.random.default_rng(4).normal(size=(7, model.config.emb_dim)), jnp.float32)
    rows = _rows(vocab, count=3)
    # Ids of task A, of task B, and none.
    rows = [[*range(vocab, vocab + 4), *rows[0]], [*range(vocab + 4, vocab + 7), *rows[1]], rows[2]]
    together = target_logits(model, params, prompt, _batch(rows, 28))
    for row, logits in zip(rows, together, strict=True):
        alone = target_logits(model, params, prompt if row[0] >= vocab else None, _batch([row], 28))[0]
        np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


def test_packed_rows_equal_unpacked(case):
    model, params = case
    vocab = model.config.vocab_size
    prompt = jnp.asarray(np.random.default_rng(5).normal(size=(4, model.config.emb_dim)), jnp.float32)
    rows = _rows(vocab, count=3)
    rows = [[*range(vocab, vocab + 4), *rows[0]], rows[1], [*range(vocab, vocab + 4), *rows[2]]]
    packed = decoder_rows([[Tokens(row[:-6], row[-6:]) for row in rows]], 64, 18)
    together = target_logits(model, params, prompt, packed)[0].reshape(3, 6, -1)
    for row, logits in zip(rows, together, strict=True):
        alone = target_logits(model, params, prompt, _batch([row], 30))[0]
        np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-4)  # logits of about 10, summed in another order


def test_generation_ends_at_a_stop_token(case):
    model, params = case
    rows = _rows(model.config.vocab_size, count=4)
    free = _generate(model, params, None, rows)
    stops = np.zeros(model.config.vocab_size, bool)
    stops[free[0, 3]] = True
    out = _generate(model, params, None, rows, stops=stops)
    for whole, cut in zip(free.tolist(), out.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if stops[token]), len(whole))
        assert cut == whole[:end] + [-1] * (len(whole) - end)


def test_frozen_kernel_costs_no_weight_gradient():
    from promot_jax.models.layers import matmul

    x, kernel = jnp.ones((5, 3)), jnp.ones((3, 4))

    def dots(argument):
        grad = jax.grad(lambda x, kernel: matmul(x, kernel).sum(), argnums=argument)
        return str(jax.make_jaxpr(grad)(x, kernel)).count("dot_general")

    assert dots(0) == 2  # forward, dx
    assert dots((0, 1)) == 3


def test_bfloat16_products_accumulate_in_float32():
    from promot_jax.models.layers import matmul

    noise = np.random.default_rng(0)
    x = jnp.asarray(noise.normal(size=(2, 3, 512)), jnp.bfloat16)
    kernel = jnp.asarray(noise.normal(size=(512, 8)), jnp.float32)

    def loss(x, kernel):
        return (matmul(x, kernel).astype(jnp.float32) * jnp.arange(8)).sum()

    dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, np.float32) @ np.asarray(kernel.astype(jnp.bfloat16), np.float32)
    np.testing.assert_allclose(np.asarray(matmul(x, kernel), np.float32), exact, rtol=2**-8, atol=1e-2)
    expected = np.einsum("bli,o->io", np.asarray(x, np.float32), np.arange(8, dtype=np.float32))
    np.testing.assert_allclose(dkernel, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_recompute_what_their_policy_does_not_keep(dtype):
    """Products in the trace of a gradient: "dots" computes those of attention again, others linear layers' too."""
    config = dataclasses.replace(CONFIGS["grouped, tied"], dtype=dtype)
    batch = decoder_rows([[Tokens([1, 2, 3], [4, 5])]], 8, 2)
    params = jax.eval_shape(build(config).init, jax.random.key(0))

    def products(remat):
        model = build(dataclasses.replace(config, remat=remat))
        gradient = jax.grad(lambda params: target_logits(model, params, None, batch).sum())
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general")

    linear, attention = 7, 2
    counts = {remat: products(remat) for remat in ("none", "dots", "attention", "mlp", "full")}
    assert counts["dots"] - counts["none"] == attention
    assert counts["full"] - counts["none"] == linear + attention - 1  # nothing asks for the output of the last one
    assert counts["attention"] - counts["dots"] == 2 and counts["mlp"] - counts["dots"] == 4
    assert (products(False), products(True)) == (counts["none"], counts["full"])


def test_what_layers_keep_in_bfloat16_is_not_converted_on_a_cpu(monkeypatch):
    """The same gradients, bit by bit, without a float32 stack of what all layers keep of a linear layer."""
    config = dataclasses.replace(CONFIGS["grouped, tied"], dtype="bfloat16", remat="dots")
    batch = decoder_rows([[Tokens([1, 2, 3], [4, 5])], [Tokens([1], [2])]], 8, 2)
    params = jax.jit(build(config).init)(jax.random.key(0))
    stacked = re.compile(rf"f32\[{config.num_layers},2,8,{config.mlp_dim}\]")

    def compiled():
        model = build(config)
        return jax.jit(jax.grad(lambda params: target_logits(model, params, None, batch).sum())).lower(params).compile()

    kept = compiled()
    monkeypatch.setattr(layers, "keep", layers.checkpoint_name)
    jax.clear_caches()  # a model that is equal is not traced again
    named = compiled()
    jax.clear_caches()
    assert stacked.search(named.as_text()), "this XLA makes no such stack: `layers.keep` may go"
    assert not stacked.search(kept.as_text())
    jax.tree.map(np.testing.assert_array_equal, kept(params), named(params))


def test_config_refuses_what_cannot_be_built():
    with pytest.raises(UserError, match="remat is 'all'; use one of 'none', 'dots', 'attention', 'mlp', 'full'"):
        DecoderConfig(97, 48, 6, 2, 3, 8, 80, remat="all")
    with pytest.raises(UserError, match="6 heads"):
        DecoderConfig(97, 48, 6, 4, 3, 8, 80)
    with pytest.raises(UserError, match="even"):
        DecoderConfig(97, 48, 6, 2, 3, 7, 80)
    with pytest.raises(UserError, match="float16"):
        DecoderConfig(97, 48, 6, 2, 3, 8, 80, dtype="float16")
