"""Gemma 2 and 3, Qwen 2.5 and 3 against transformers (PyTorch, float32) holding the same random weights.

Rows are longer than the window, and a layer of either kind comes twice where there are two kinds.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax import decoding, trees
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build, layouts
from promot_jax.partitioning import Partitioner

pytestmark = pytest.mark.usefixtures("fast_compilation")
WINDOW, PROMPT, TARGETS = 5, 4, 6
GEMMA = {"activation": "gelu", "norm_offset": 1.0, "post_norms": True, "embedding_scale": True, "norm_eps": 1e-6}
SIZES = {"vocab_size": 61, "emb_dim": 48, "num_kv_heads": 2, "mlp_dim": 40}
# Our config, and the model and settings of transformers that stand for the same.
FAMILIES = {
    "gemma3": (
        DecoderConfig(
            **SIZES, num_heads=4, num_layers=4, head_dim=16, rope_theta=1e6, **GEMMA, qk_norm=True,
            query_scale=24**-0.5, window=WINDOW, global_every=2, local_rope_theta=1e2, rope_factor=8.0,
        ),
        "Gemma3TextConfig Gemma3ForCausalLM",
        {
            "query_pre_attn_scalar": 24, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "gemma2": (
        DecoderConfig(
            **SIZES, num_heads=4, num_layers=4, head_dim=16, **GEMMA, query_scale=16**-0.5, attention_softcap=2.0,
            logits_softcap=3.0, window=WINDOW, global_every=2,
        ),
        "Gemma2Config Gemma2ForCausalLM",
        {
            "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen2": (
        DecoderConfig(**SIZES, num_heads=4, num_layers=2, head_dim=12, qkv_bias=True, tied_embeddings=False),
        "Qwen2Config Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3": (
        DecoderConfig(**SIZES, num_heads=6, num_layers=2, head_dim=20, qk_norm=True, norm_eps=1e-6),
        "Qwen3Config Qwen3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "self_attention/query", "self_attn.k_proj": "self_attention/key",
    "self_attn.v_proj": "self_attention/value", "self_attn.o_proj": "self_attention/out",
    "self_attn.q_norm": "self_attention/query_norm", "self_attn.k_norm": "self_attention/key_norm",
    "mlp.gate_proj": "mlp/wi_0", "mlp.up_proj": "mlp/wi_1", "mlp.down_proj": "mlp/wo",
    "input_layernorm": "pre_self_attention_layer_norm", "post_attention_layernorm": "pre_mlp_layer_norm",
}  # fmt: skip
GEMMA_NAMES = {
    "post_attention_layernorm": "post_self_attention_layer_norm",
    "pre_feedforward_layernorm": "pre_mlp_layer_norm",
    "post_feedforward_layernorm": "post_mlp_layer_norm",
}


def ours_of(config, tensors):
    """Arrays by transformers' names as our tree: layers stacked, kernels transposed."""
    names = NAMES | (GEMMA_NAMES if config.post_norms else {})
    flat, stacks = {}, {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if name == "model.embed_tokens.weight":
            flat["token_embedder/embedding"] = array
        elif name == "model.norm.weight":
            flat["decoder/decoder_norm/scale"] = array
        elif name == "lm_head.weight":
            if not config.tied_embeddings:
                flat["decoder/logits_dense/kernel"] = array.T
        else:
            index, module, leaf = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
            kind = "bias" if leaf == "bias" else "scale" if "norm" in module else "kernel"
            stack = stacks.setdefault(f"decoder/layers/{names[module]}/{kind}", [None] * config.num_layers)
            stack[int(index)] = array.T
    return trees.unflatten(flat | {path: np.stack(stack) for path, stack in stacks.items()})


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    """A model, its random parameters, a random prompt, and the PyTorch twin."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, classes, more = FAMILIES[request.param]
    make_config, make = (getattr(transformers, name) for name in classes.split())
    settings = {
        "vocab_size": config.vocab_size, "hidden_size": config.emb_dim, "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        "attn_implementation": "eager",
    }  # fmt: skip
    twin = make(make_config(**settings | more)).eval()
    noise = np.random.default_rng(0)
    for name, weight in twin.named_parameters():
        norm = 0.3 * noise.normal(size=weight.shape) + (1 - config.norm_offset)
        wide = noise.normal(size=weight.shape) * weight.shape[-1] ** -0.5
        weight.data = torch.tensor(norm if "norm" in name else wide, dtype=torch.float32)
    params = ours_of(config, {name: weight.detach() for name, weight in twin.named_parameters()})
    prompt = noise.normal(size=(PROMPT, config.emb_dim)).astype(np.float32)
    return build(config), jax.tree.map(jnp.asarray, params), jnp.asarray(prompt), twin


def rows_of(vocab, count=4, low=8, high=20):
    noise = np.random.default_rng(1)
    return [noise.integers(0, vocab, noise.integers(low, high)).tolist() for _ in range(count)]


def with_prompt(vocab, row):
    return [*range(vocab, vocab + PROMPT), *row]


def batch_of(rows):
    """Rows of one or several sequences each, whose last tokens are the targets; one shape for all tests."""
    tokens = [[layouts.Tokens(row[:-TARGETS], row[-TARGETS:]) for row in several] for several in rows]
    return layouts.decoder_rows(tokens, 68, 3 * TARGETS)


@partial(jax.jit, static_argnames="model")
def logits_of(model, params, prompt, batch):
    return model.logits(params, prompt, batch)


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_parameters_are_those_of_a_fresh_model(pair):
    model, params, _, _ = pair
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)


def test_logits_agree_packed_or_not_with_a_prompt_or_not(pair):
    """Row 0 packs three sequences, two of them behind the prompt; then these one by one, and a plain one."""
    import torch

    model, params, prompt, twin = pair
    vocab = model.config.vocab_size
    rows = rows_of(vocab)
    prompted = [with_prompt(vocab, rows[0]), rows[1], with_prompt(vocab, rows[2])]
    logits = np.asarray(logits_of(model, params, prompt, batch_of([prompted, *([row] for row in prompted), [rows[3]]])))
    packed = logits[0].reshape(3, TARGETS, -1)
    for index, row in enumerate([*prompted, rows[3]]):
        plain = torch.tensor([[token for token in row if token < vocab]])
        with torch.no_grad():
            embedded = twin.get_input_embeddings()(plain)
            if row[0] >= vocab:
                embedded = torch.cat([torch.tensor(np.array(prompt))[None], embedded], dim=1)
            theirs = twin(inputs_embeds=embedded).logits[0, -TARGETS - 1 : -1]
            if row[0] < vocab:
                assert torch.equal(theirs, twin(plain).logits[0, -TARGETS - 1 : -1])
        assert_close(logits[index + 1, :TARGETS], theirs)
        if index < 3:
            assert_close(packed[index], theirs)
    embedded = twin.get_input_embeddings()(torch.tensor(rows[3])).detach()
    np.testing.assert_array_equal(model.input_rows(params, jnp.asarray(rows[3])), embedded)


def test_every_gradient_agrees(pair):
    import torch

    model, params, prompt, twin = pair
    vocab = model.config.vocab_size
    row = rows_of(vocab)[0]
    batch = batch_of([[with_prompt(vocab, row)]])

    @jax.jit
    def gradients(params, prompt):
        def loss(params, prompt):
            logits = jax.nn.log_softmax(model.logits(params, prompt, batch)[:, :TARGETS])
            return -jnp.take_along_axis(logits, jnp.array([row[-TARGETS:]])[..., None], -1).sum()

        return jax.grad(loss, (0, 1))(params, prompt)

    ours, of_prompt = gradients(params, prompt)
    twin.zero_grad()
    leading = torch.tensor(np.array(prompt), requires_grad=True)
    embedded = torch.cat([leading[None], twin.get_input_embeddings()(torch.tensor([row]))], dim=1)
    logits = torch.log_softmax(twin(inputs_embeds=embedded).logits[0, -TARGETS - 1 : -1], -1)
    (-logits.gather(1, torch.tensor(row[-TARGETS:])[:, None]).sum()).backward()
    theirs = trees.flatten(ours_of(model.config, {name: p.grad for name, p in twin.named_parameters()}))
    for path, gradient in trees.flatten(ours).items():
        assert_close(gradient, theirs[path], 1e-3)
    assert_close(of_prompt, leading.grad, 1e-3)


def test_greedy_generation_agrees_beyond_the_window(pair):
    """Rows of differing lengths share their cache slots: the window goes by positions, not by slots."""
    import torch

    model, params, _, twin = pair
    rows, steps = rows_of(model.config.vocab_size, count=6, low=1), 10
    tokens = np.zeros((len(rows), 24), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    stops = np.zeros(model.config.vocab_size, bool)
    settings = decoding.Decoding(max_tokens=steps)
    ours = decoding.generate(model, settings, params, None, inputs, stops, np.int32(steps), jax.random.key(0))
    for row, ids in zip(rows, np.asarray(ours), strict=True):
        given = torch.tensor([row])
        theirs = twin.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=steps, do_sample=False, eos_token_id=None
        )
        assert ids.tolist() == theirs[0, len(row) :].tolist()


def test_windows_and_both_kinds_of_rotation_change_the_logits(pair):
    """What did nothing would agree with a twin that does nothing, too."""
    model, params, prompt, _ = pair
    if not model.config.window:
        pytest.skip("all layers are alike")
    batch = batch_of([[row] for row in rows_of(model.config.vocab_size, count=5)])
    known = logits_of(model, params, prompt, batch)
    for change in ({"window": 0}, {"local_rope_theta": 1e3}):
        other = build(dataclasses.replace(model.config, **change))
        assert not np.allclose(known, logits_of(other, params, prompt, batch), rtol=1e-3, atol=1e-3), change


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_has_a_place_on_the_mesh(family):
    shapes = jax.eval_shape(build(FAMILIES[family][0]).init, jax.random.key(0))
    specs = Partitioner().specs({"model": shapes})
    biases = {path: spec for path, spec in specs.items() if path.endswith("/bias")}
    assert len(biases) == 3 * FAMILIES[family][0].qkv_bias and all(spec[1] == "model" for spec in biases.values())


def test_config_refuses_what_cannot_be_built():
    config = FAMILIES["gemma3"][0]
    for change in ({"activation": "swish"}, {"window": -1}, {"global_every": 0}, {"rope_factor": 0.0}):
        with pytest.raises(UserError, match=next(iter(change))):
            dataclasses.replace(config, **change)
