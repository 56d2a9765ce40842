"""Every key of a config.json that can change what a model computes is used, or refused unless it is neutral.

The reference is transformers: it builds the same weights with the same changed config, and what we accept has to give
its logits.
"""

import functools
from collections.abc import Iterator
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.checkpoints import placement
from promot_jax.checkpoints.huggingface import config as hf_config
from promot_jax.checkpoints.huggingface import names
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import CONFIGS, build
from promot_jax.models.batch_layout import Tokens

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
WINDOW, FULL = "sliding_attention", "full_attention"
# Keys of published configs that change no logits: what they say of training, generation, files and other programs.
NO_EFFECT = {
    "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dropout_rate", "dtype", "eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id",
    "max_window_layers", "model_type", "n_positions", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sliding_window", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed", "use_cache",
}  # fmt: skip
# What is tried beside the values that suit a key's type.
TRIED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_new", "gelu", "relu"), "hidden_activation": ("silu", "gelu"),
    "rope_scaling": (LINEAR, LINEAR | {"rope_theta": 5e2}, {"type": "linear", "factor": 2.0}, {"rope_type": "yarn"},
                     LLAMA3 | {"original_max_position_embeddings": 16}, LLAMA3),
    "rope_parameters": ({"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
                        {FULL: {"rope_type": "default", "rope_theta": 50.0}}),
    "layer_types": ([WINDOW, FULL], [FULL, WINDOW], [WINDOW, WINDOW], [FULL, FULL]),
    "sliding_window": (3,), "sliding_window_pattern": (1, 2, 3), "num_key_value_heads": (4, None),
    "dense_act_fn": ("relu", "gelu_new", "silu"), "feed_forward_proj": ("relu", "gated-gelu", "gated-silu", "gelu"),
    "is_gated_act": (True, False), "attn_logit_softcapping": (1.5, None), "final_logit_softcapping": (1.5, None),
    "decoder_start_token_id": (5,), "quantization_config": ({"bits": 4},), "tie_word_embeddings": (True, False),
    "original_max_position_embeddings": (32,), "scale_decoder_outputs": (True, False), "partial_rotary_factor": (0.5,),
    "use_bidirectional_attention": (True,), "pruned_heads": ({"0": [1]},),
}  # fmt: skip
# Two changes at once, of keys that transformers reads together.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 70.0},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 64},
    {"rope_scaling": LINEAR, "rope_parameters": {FULL: {"rope_theta": 50.0}, WINDOW: {"rope_theta": 20.0}}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
    {"layer_types": None, "sliding_window_pattern": 1},
    {"layer_types": None, "sliding_window_pattern": 3},
    {"dense_act_fn": "relu", "feed_forward_proj": "gated-gelu"},
    {"dense_act_fn": "gelu_new", "feed_forward_proj": "gated-relu"},
    {"dense_act_fn": "gelu_new", "is_gated_act": True, "feed_forward_proj": "relu"},
    {"num_key_value_heads": None, "num_attention_heads": 2, "head_dim": 16},
)


def published(kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model and its config with every key that transformers or one of our lists knows of its type."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_decoder_layers": 2} if "t5" in kind else {"num_hidden_layers": 2}
    if kind.startswith("gemma"):
        sizes |= {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 12, "tie_word_embeddings": True}
    if kind == "qwen3":
        sizes |= {"head_dim": 8}
    if kind == "mt5":
        sizes |= {"tie_word_embeddings": False}
    model = hf_models.build(kind, **sizes)
    values = model.config.to_dict()
    values |= {"tie_word_embeddings": kind == "t5"} if "t5" in kind else {}
    if "scale_decoder_outputs" in values:
        values["scale_decoder_outputs"] = True
    return model, values


def aliases_of(kind: str) -> dict[str, str]:
    """Other names under which transformers reads a key of the type, which it never writes: `attribute_map`."""
    return dict(transformers.CONFIG_MAPPING[kind].attribute_map)


def changes(kind: str, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Configs that differ in a key, or in a few."""
    aliases = aliases_of(kind)
    for key in sorted({*values, *aliases, *hf_config.USED[kind], *hf_config.NEUTRAL[kind]} - {"model_type"}):
        value, tried = values.get(aliases.get(key, key), ...), TRIED.get(key, ())
        if not tried and isinstance(value, bool):
            tried = (not value,)
        elif not tried and isinstance(value, (int, float)):
            tried = (value * 2 + 1, value / 2)
        if type(value) is int and key.endswith("_layers"):
            tried = (*tried, value // 2)
        for new in (*tried, None):
            yield {key: new}
    yield from (both for both in TOGETHER if both.keys() <= {*values, *hf_config.USED[kind], *hf_config.NEUTRAL[kind]})


@pytest.mark.parametrize("kind", hf_config.USED)
def test_every_key_is_listed(kind: str) -> None:
    """Each key that transformers writes of a type is used, checked, or known to change nothing."""
    known = hf_config.USED[kind].keys() | hf_config.NEUTRAL[kind].keys() | NO_EFFECT
    assert published(kind)[1].keys() | aliases_of(kind).keys() <= known
    assert not hf_config.USED[kind].keys() & hf_config.NEUTRAL[kind].keys()


@pytest.mark.parametrize(
    ("kind", "change", "fields"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, None),
        ("gemma3_text", {"final_logit_softcapping": 20.0}, {"logits_softcap": 20.0}),
        ("gemma3_text", {"sliding_window": None}, None),
        ("gemma3_text", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ("gemma2", {"layer_types": None, "sliding_window_pattern": 1}, None),
        ("gemma2", {"layer_types": None}, {"global_every": 2, "window": 5}),
        ("t5", {"dense_act_fn": "silu"}, None),
        ("t5", {"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu", "is_gated_act": True}, None),
        ("t5", {"feed_forward_proj": "gated-silu", "dense_act_fn": "gelu_new", "is_gated_act": True},
         {"mlp_activations": ("gelu", "linear")}),
        ("t5", {"decoder_start_token_id": 5}, None),
        ("t5", {"num_hidden_layers": 1}, {"num_encoder_layers": 1, "num_decoder_layers": 2}),
        ("t5", {"num_hidden_layers": 1, "num_decoder_layers": None},
         {"num_encoder_layers": 1, "num_decoder_layers": 2}),
        ("mt5", {"num_attention_heads": 2, "head_dim": 16}, {"num_heads": 2, "head_dim": 16}),
        ("mt5", {"hidden_size": 32, "d_model": 48}, {"emb_dim": 32}),
        ("t5", {"num_hidden_layers": None}, None),
        ("llama", TOGETHER[0], {"rope_theta": 1e4, "rope_factor": 2.0}),
        ("llama", TOGETHER[1], {"rope_theta": 70.0, "rope_factor": 2.0}),
        ("llama", TOGETHER[2], {"rope_original_length": 64}),
        ("llama", {"rope_scaling": LLAMA3}, {"rope_original_length": 128}),
        ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("qwen2", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("qwen2", {"num_attention_heads": None}, None),
    ],
)  # fmt: skip
def test_configs_that_were_read_otherwise(kind: str, change: dict[str, Any], fields: dict[str, Any] | None) -> None:
    """What transformers' configuration classes make of them (None: refused); the slow test compares the logits."""
    model, values = published(kind)
    if fields is None:
        with pytest.raises(UserError, match=r"config\.json"):
            hf_config.read(values | change, model.state_dict())
    else:
        found = hf_config.full(*hf_config.read(values | change, model.state_dict()))
        assert {key: found[key] for key in fields} == fields


@pytest.mark.slow
@pytest.mark.parametrize("kind", hf_config.USED)
def test_a_changed_config_is_refused_or_computed_as_transformers_does(kind: str) -> None:
    model, values = published(kind)
    state = hf_models.leaves(model)
    seq2seq = "t5" in kind
    rng = np.random.default_rng(0)
    ids, answer = rng.integers(3, 272, 24), rng.integers(3, 272, 6)

    @functools.cache
    def ours(config: Any) -> np.ndarray:
        family, fields = ("t5" if seq2seq else "decoder"), vars(config)
        params = placement.load(_entries(family, fields, state), Partitioner()).params
        whole = Tokens(ids.tolist(), answer.tolist()) if seq2seq else Tokens(ids[:1].tolist(), ids[1:].tolist())
        made = build(config, Partitioner())
        batch = made.layout([[whole]], 24, 6 if seq2seq else 23)
        return np.asarray(target_logits(made, params, None, batch))[0]

    def theirs(config: dict[str, Any]) -> np.ndarray | None:
        try:
            parsed = type(model.config).from_dict(config)
            other = type(model)(parsed)
            other.lm_head.weight = torch.nn.Parameter(
                other.lm_head.weight.detach().clone()
            )  # the state says what is shared
            if other.load_state_dict(model.state_dict(), strict=False).missing_keys:  # unexpected ones are left out
                return None
            with torch.no_grad():
                if not seq2seq:
                    return other.eval()(torch.tensor(ids[None])).logits[0, :-1].numpy()
                return other.eval()(torch.tensor(ids[None]), labels=torch.tensor(answer[None])).logits[0].numpy()
        except Exception:  # transformers has its own ways to refuse
            return None

    accepted, refused = 0, []
    for change in ({}, *changes(kind, values)):
        try:
            _, kwargs = hf_config.read(values | change, state)
        except UserError:
            refused.append(change)
            continue
        if (want := theirs(values | change)) is None:
            continue
        try:
            found = ours(CONFIGS["t5" if seq2seq else "decoder"](**kwargs))
        except UserError:  # of the tensors
            refused.append(change)
            continue
        accepted += 1
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3, err_msg=str(change))
    assert accepted > 20 and {} not in refused


def _entries(family: str, fields: Any, state: dict[str, np.ndarray]) -> dict[str, placement.Entry]:
    table = names.table(family, fields)
    sources = names.sources(table, family, fields, state)
    for name in table:  # as `load.read` compares copies
        for copy in state.keys() & set(name.tensors):
            if not np.array_equal(state[copy], state[sources[name.leaf][0]]):
                raise UserError(f"{copy} is another table")
    stored = {key: placement.Stored(leaf.shape, "F32", True) for key, leaf in state.items()}
    names.check("model", table, sources, stored, lambda key: True)
    return names.entries(table, sources, lambda _, source: lambda first, count: state[source][first : first + count])
