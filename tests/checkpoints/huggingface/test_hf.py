"""Hugging Face folders: every tensor in its place, the config the model's own, one clear error for anything else."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import trees
from promot_jax.checkpoints import placement as places
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.huggingface import config as hf_config
from promot_jax.checkpoints.huggingface import load, names
from promot_jax.checkpoints.locate import locate
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.models.layers import rotary_frequencies
from promot_jax.params.fingerprint import fingerprint

PLACES = Partitioner()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 40.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20},
}
T5S: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5 gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"tie_word_embeddings": False},
}


def flat(folder: Path) -> tuple[load.Loaded, dict[str, np.ndarray]]:
    loaded = load.read(folder, PLACES)
    return loaded, {path: np.asarray(leaf) for path, leaf in trees.flatten(loaded.placed.params).items()}


def decoder_leaves(state: dict[str, np.ndarray], gemma: bool) -> dict[str, np.ndarray]:
    """What a decoder's tensors are in our tree, written out once more."""
    found = {"token_embedder/embedding": state["model.embed_tokens.weight"]}
    found["decoder/decoder_norm/scale"] = state["model.norm.weight"]
    parts = {f"self_attention/{ours}/kernel": f"self_attn.{short}_proj.weight" for ours, short in ATTENTION.items()}
    parts |= {f"self_attention/{ours}/bias": f"self_attn.{short}_proj.bias" for ours, short in ATTENTION.items()}
    parts |= {f"self_attention/{ours}_norm/scale": f"self_attn.{ours[0]}_norm.weight" for ours in ("query", "key")}
    parts |= {"mlp/wi_0/kernel": "mlp.gate_proj.weight", "mlp/wi_1/kernel": "mlp.up_proj.weight"}
    parts |= {"mlp/wo/kernel": "mlp.down_proj.weight", "pre_self_attention_layer_norm/scale": "input_layernorm.weight"}
    if gemma:
        parts |= {"post_self_attention_layer_norm/scale": "post_attention_layernorm.weight"}
        parts |= {"pre_mlp_layer_norm/scale": "pre_feedforward_layernorm.weight"}
        parts |= {"post_mlp_layer_norm/scale": "post_feedforward_layernorm.weight"}
    else:
        parts |= {"pre_mlp_layer_norm/scale": "post_attention_layernorm.weight"}
    for ours, theirs in parts.items():
        if f"model.layers.0.{theirs}" in state:
            layers = [state[f"model.layers.{i}.{theirs}"] for i in range(3)]
            found[f"decoder/layers/{ours}"] = np.stack([w.T if ours.endswith("kernel") else w for w in layers])
    return found


@pytest.mark.parametrize("case", DECODERS)
def test_decoders_leaf_for_leaf(tmp_path: Path, case: str) -> None:
    kind = case.split()[0]
    model = hf_models.save(tmp_path, kind, **({"tie_word_embeddings": True} | DECODERS[case]))
    state = hf_models.leaves(model)
    want = decoder_leaves(state, kind.startswith("gemma"))
    if not model.config.tie_word_embeddings:
        want["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    loaded, found = flat(tmp_path)
    assert found.keys() == want.keys() and loaded.family == "decoder" and loaded.unused == ()
    for path, leaf in want.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    config = hf_config.full("decoder", loaded.config)
    gemma, third, head = kind.startswith("gemma"), kind == "gemma3_text", DECODERS[case].get("head_dim", 8)
    want_config = {
        "vocab_size": 272, "emb_dim": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 3, "head_dim": head,
        "mlp_dim": 48, "rope_theta": 1e6 if third else 1e4, "norm_eps": 1e-6, "max_length": 128, "rope_factor": 1.0,
        "tied_embeddings": model.config.tie_word_embeddings, "activation": "gelu" if gemma else "silu",
        "qkv_bias": kind == "qwen2", "qk_norm": third or kind == "qwen3", "norm_offset": float(gemma),
        "post_norms": gemma, "embedding_scale": gemma, "query_scale": 20**-0.5 if gemma else None,
        "window": 8 if gemma else 0, "global_every": 4 if third else 2 if gemma else 1, "local_rope_theta": 1e4,
        "attention_softcap": 40.0 * (gemma and not third), "logits_softcap": 30.0 * (gemma and not third),
        "rope_low_turns": 0.0, "rope_high_turns": 0.0, "rope_original_length": 0,
    }  # fmt: skip
    assert config == want_config
    # And back: transformers' config is the same again, as far as both say it.
    written, theirs = hf_config.write("decoder", loaded.config), model.config.to_dict()
    again = type(model.config)(**written).to_dict()
    skip = {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "transformers_version"}
    if not gemma:
        skip |= {"head_dim"}
    assert {k: v for k, v in again.items() if k not in skip} == {
        k: v for k, v in theirs.items() if k not in skip and k in again
    }


@pytest.mark.parametrize("case", T5S)
def test_t5_leaf_for_leaf(tmp_path: Path, case: str) -> None:
    model = hf_models.save(tmp_path, case.split()[0], **T5S[case])
    state = hf_models.leaves(model)
    gated, tied = case != "t5", case == "t5"
    want = {"token_embedder/embedding": state["shared.weight"]}
    if not tied:
        want["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        block = f"{stack}.block"
        own = "attention" if stack == "encoder" else "self_attention"
        want[f"{stack}/{stack}_norm/scale"] = state[f"{stack}.final_layer_norm.weight"]
        bias = f"{block}.0.layer.0.SelfAttention.relative_attention_bias.weight"
        want[f"{stack}/relpos_bias/rel_embedding"] = state[bias].T
        parts = {f"pre_{own}_layer_norm/scale": "0.layer_norm.weight"}
        parts |= {f"{own}/{ours}/kernel": f"0.SelfAttention.{short}.weight" for ours, short in ATTENTION.items()}
        last = 1 if stack == "encoder" else 2
        if stack == "decoder":
            parts["pre_cross_attention_layer_norm/scale"] = "1.layer_norm.weight"
            for ours, short in ATTENTION.items():
                parts[f"encoder_decoder_attention/{ours}/kernel"] = f"1.EncDecAttention.{short}.weight"
        parts["pre_mlp_layer_norm/scale"] = f"{last}.layer_norm.weight"
        for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            parts[f"mlp/{name}/kernel"] = f"{last}.DenseReluDense.{name}.weight"
        for ours, theirs in parts.items():
            tensors = [state[f"{block}.{i}.layer.{theirs}"] for i in range(layers)]
            want[f"{stack}/layers/{ours}"] = np.stack([w.T if ours.endswith("kernel") else w for w in tensors])
    loaded, found = flat(tmp_path)
    assert loaded.family == "t5" and found.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert hf_config.full("t5", loaded.config) == {
        "vocab_size": 272, "emb_dim": 32, "num_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 3,
        "head_dim": 8, "mlp_dim": 48, "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "tied_embeddings": tied, "norm_eps": 1e-6, "relative_buckets": 8, "relative_max_distance": 20,
        "max_length": 0,
    }  # fmt: skip
    assert hf_config.read(hf_config.write("t5", loaded.config), state)[1] == loaded.config


@pytest.fixture(name="llama", scope="module")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return folder, hf_models.save(folder, "llama", tie_word_embeddings=True)


@pytest.fixture(name="copy")
def _copy(llama: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree(llama[0], tmp_path / "llama")


def test_logits_of_a_llama(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    base = pretrained.load(str(folder), Partitioner())
    assert base.leaves == {"loaded": 11, "new": 0, "unused": 0}
    assert base.fingerprint == base.base == fingerprint(base.params)
    assert base.vocabulary.decode(base.vocabulary.encode("some text")) == "some text"
    ids = np.random.default_rng(0).integers(0, 272, 20)
    batch = decoder_rows([[Tokens(ids[:1].tolist(), ids[1:].tolist())]], 32, 19)
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None])).logits[0, :-1].numpy()
    np.testing.assert_allclose(target_logits(base.model, base.params, None, batch)[0], theirs, rtol=1e-4, atol=1e-4)


def test_sizes_of_another_are_refused_before_a_tensor_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dataclasses.replace(pretrained.load(str(copy), Partitioner()).model.config, rope_theta=5.0)
    monkeypatch.delattr(places, "load")
    with pytest.raises(UserError, match=r"rope_theta 5.0 instead of"):
        pretrained.load(str(copy), Partitioner(), config=given)


@pytest.mark.parametrize("length", [32, 128])
def test_logits_of_a_llama_3(tmp_path: Path, length: int) -> None:
    """Some frequencies stay, some are divided, some lie between; what is written back is read as the same."""
    sizes = {"tie_word_embeddings": True, "head_dim": 32, "rope_theta": 5e5}
    model = hf_models.save(tmp_path, "llama", **sizes, rope_scaling=LLAMA3)
    base = pretrained.load(str(tmp_path), Partitioner())
    config = base.model.config
    assert (config.rope_theta, config.rope_factor, config.rope_original_length) == (5e5, 8.0, 64)
    ours = rotary_frequencies(32, 5e5, 8.0, config.rope_low_turns, config.rope_high_turns, 64)
    np.testing.assert_allclose(ours, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    ratio = np.asarray(rotary_frequencies(32, 5e5) / ours)
    assert (ratio == 1).any() and (ratio > 7.99).any() and ((ratio > 1.01) & (ratio < 7.9)).any()
    ids = np.random.default_rng(0).integers(0, 272, length)
    batch = decoder_rows([[Tokens(ids[:1].tolist(), ids[1:].tolist())]], length, length - 1)
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None])).logits[0, :-1].numpy()
    np.testing.assert_allclose(target_logits(base.model, base.params, None, batch)[0], theirs, rtol=1e-4, atol=1e-4)
    written = hf_config.write("decoder", config)
    assert hf_config.full(*hf_config.read(written, ["x"] * 9)) == hf_config.full("decoder", config)


def test_a_tokenizer_of_more_tokens_than_rows(copy: Path, tmp_path: Path) -> None:
    """Control tokens need no row, as Gemma 3 1B's image token and an added <pad>; transformers reads text the same."""
    from transformers import AutoTokenizer

    from promot_jax.checkpoints import export

    data = json.loads((copy / "tokenizer.json").read_text())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    plain = [*data["added_tokens"]]
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

    def write(special: bool, **roles: str) -> None:
        tokens = [{"id": 259 + i, "content": f"<{i}>"} | added | {"special": special} for i in range(14)]
        (copy / "tokenizer.json").write_text(json.dumps(data | {"added_tokens": plain + tokens}))
        (copy / "tokenizer_config.json").write_text(json.dumps(config | roles))

    write(True, pad_token="<13>")
    base = pretrained.load(str(copy), Partitioner())
    assert base.vocabulary.vocab_size == 272 and base.vocabulary.pad_id == base.vocabulary.eos_id == 0
    theirs = AutoTokenizer.from_pretrained(copy)
    assert len(theirs) == 273
    assert base.vocabulary.encode("some text") == theirs("some text", add_special_tokens=False).input_ids
    assert max(base.vocabulary.encode("<13> <12>")) < 272 and base.vocabulary.decode([67, 272, 67]) == "aa"
    export.write(tmp_path / "exported", base, {"task": np.ones((2, 32), np.float32)})
    names = AutoTokenizer.from_pretrained(tmp_path / "exported").convert_ids_to_tokens([271, 272, 273])
    assert names == ["<12>", "<promot_task_0>", "<promot_task_1>"]
    write(True, eos_token="<13>")
    with pytest.raises(UserError, match="eos id 272 lies outside of a vocabulary of 272 tokens"):
        pretrained.load(str(copy), Partitioner())
    write(False)
    with pytest.raises(UserError, match="273 tokens and 272 embedding rows, none for '<13>'"):
        pretrained.load(str(copy), Partitioner())
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer \(tokenizer\.json, spiece\.model or tokenizer\.model\)"):
        pretrained.load(str(copy), Partitioner())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(copy: Path, llama: tuple[Path, Any], dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(copy / load.SINGLE).items()}
    safetensors.torch.save_file(state, copy / load.SINGLE)
    want = decoder_leaves({name: tensor.float().numpy() for name, tensor in state.items()}, False)
    for path, leaf in flat(copy)[1].items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, want[path])


def test_shards(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = llama
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert fingerprint(flat(tmp_path)[0].placed.params) == fingerprint(flat(folder)[0].placed.params)
    index = json.loads((tmp_path / load.INDEX).read_text())
    one = min(tmp_path.glob("model-*.safetensors"))

    def refused(message: str, **weight_map: Any) -> None:
        (tmp_path / load.INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | weight_map}))
        with pytest.raises(UserError, match=message):
            load.read(tmp_path, PLACES)

    shutil.copy(one, tmp_path.parent / "outside.safetensors")
    for climbing in ("../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b.safetensors", "", "\0"):
        refused("plain file name|names .* files", x=climbing)
    refused("no weight_map", x=3)
    refused("lacks nowhere", x="nowhere.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path.parent / "outside.safetensors")
    refused("leads to", x="link.safetensors")
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    refused("lacks circle", x="circle.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    refused("is not a file", x="folder.safetensors")
    for text in (b'{"weight_map":' * 10 + b"{}" + b"}" * 10, b"[" * 100_000, b"{", b"[]", b"\xff", b'{"a":1,"a":2}'):
        (tmp_path / load.INDEX).write_bytes(text)
        with pytest.raises(UserError):
            load.read(tmp_path, PLACES)
    (tmp_path / load.INDEX).write_text(json.dumps(index))
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(UserError, match="file not fully covered"):
        load.read(tmp_path, PLACES)
    one.unlink()
    with pytest.raises(UserError, match=f"lacks {one.name}"):
        load.read(tmp_path, PLACES)


def test_a_whole_file_wins_over_an_index(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """As in transformers, whose `save_pretrained` leaves an older index and its shards behind."""
    from transformers import AutoModelForCausalLM

    folder, model = llama
    other = hf_models.build("llama", tie_word_embeddings=True)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path, max_shard_size="30KB")
    for file in folder.iterdir():
        shutil.copy(file, tmp_path / file.name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert (theirs == model.model.norm.weight).all() and (theirs != other.model.norm.weight).all()
    assert fingerprint(flat(tmp_path)[0].placed.params) == fingerprint(flat(folder)[0].placed.params)
    (tmp_path / load.INDEX).write_text("{")  # and is not read
    assert fingerprint(flat(tmp_path)[0].placed.params) == fingerprint(flat(folder)[0].placed.params)


def test_a_folder_in_the_place_of_the_whole_file(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """transformers reads the shards: `from_pretrained` asks for a file."""
    from transformers import AutoModelForCausalLM

    folder, model = llama
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / load.SINGLE).mkdir()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert (theirs == model.model.norm.weight).all()
    assert fingerprint(flat(tmp_path)[0].placed.params) == fingerprint(flat(folder)[0].placed.params)
    (tmp_path / load.INDEX).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is not a file"):
        flat(tmp_path)


def test_an_index_and_shards_that_name_different_tensors(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """transformers loads each of these without a missing tensor: the model is complete."""
    from transformers import AutoModelForCausalLM

    folder, model = llama
    want = fingerprint(flat(folder)[0].placed.params)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / load.INDEX).read_text())
    shard = index["weight_map"]["model.embed_tokens.weight"]
    state = safetensors.torch.load_file(tmp_path / shard)
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    stale |= {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    for named, held in ((stale, {}), ({}, stale), ({"model.rotary_emb.inv_freq": 0}, stale)):
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in stale}
        index["weight_map"] |= dict.fromkeys(named, shard)
        (tmp_path / load.INDEX).write_text(json.dumps(index))
        safetensors.torch.save_file(state | held, tmp_path / shard, metadata={"format": "pt"})
        assert not AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
        assert fingerprint(flat(tmp_path)[0].placed.params) == want
    del state["model.embed_tokens.weight"]  # the index alone has it
    safetensors.torch.save_file(state, tmp_path / shard)
    with pytest.raises(UserError, match=r"missing: model\.embed_tokens\.weight"):
        load.read(tmp_path, PLACES)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = safetensors.torch.load_file(folder / load.SINGLE)
    change(state)
    safetensors.torch.save_file(state, folder / load.SINGLE)


def test_copies_are_compared(copy: Path) -> None:
    edit(copy, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    edit(copy, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert flat(copy)[0].unused == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(copy, lambda state: state["lm_head.weight"][271, 31].add_(1e-3))
    with pytest.raises(UserError, match=r"'lm_head\.weight' with other values than"):
        load.read(copy, PLACES)


def test_copies_in_a_t5(tmp_path: Path) -> None:
    hf_models.save(tmp_path, "t5")
    want = fingerprint(flat(tmp_path)[0].placed.params)

    def rename(state: dict[str, torch.Tensor]) -> None:
        state["decoder.embed_tokens.weight"] = state.pop("shared.weight")

    edit(tmp_path, lambda state: state.update({"encoder.embed_tokens.weight": state["shared.weight"].clone()}))
    edit(tmp_path, rename)
    loaded = flat(tmp_path)[0]
    assert fingerprint(loaded.placed.params) == want and loaded.unused == ("decoder.embed_tokens.weight",)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_text_models_inside_others(copy: Path, prefix: str) -> None:
    want = fingerprint(flat(copy)[0].placed.params)

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[prefix + name.removeprefix("model.")] = state.pop(name)
        if prefix:
            state["vision_tower.x.weight"] = torch.ones(2)

    edit(copy, rename)
    assert fingerprint(flat(copy)[0].placed.params) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda s: s.update(extra=torch.ones(2)), "unexpected: extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight \(31,\) instead of \(32,\)"),
        (lambda s: s.update({"model.norm.weight": torch.ones(32).double()}), "model.norm.weight as F64"),
        (lambda s: s["model.norm.weight"].mul_(torch.nan), "decoder_norm/scale that are not finite"),
    ],
)
def test_tensors_that_disagree_with_the_config(copy: Path, change: Callable[..., Any], message: str) -> None:
    edit(copy, change)
    with pytest.raises(UserError, match=message):
        load.read(copy, PLACES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, "wrong shape"),
        ({"hidden_size": 33, "head_dim": None}, "does not divide into 4 heads"),
        ({"num_hidden_layers": 4}, "missing: model.layers.3"),
        ({"num_hidden_layers": 10**12}, "declares 1000000000000 layers"),
        ({"num_hidden_layers": -1}, "positive whole number"),
        ({"num_hidden_layers": True}, "positive whole number"),
        ({"rms_norm_eps": "1"}, "positive number"),
        ({"rms_norm_eps": float("nan")}, "positive number"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"vocab_size": 10**11}, "wrong shape"),
        ({"model_type": "mamba"}, "type 'mamba'; these are read: gemma2, gemma3_text, llama"),
        ({"model_type": "umt5"}, "type 'umt5'"),
        ({"model_type": ["llama"]}, "these are read"),
        ({"hidden_act": "relu"}, "these activations"),
        ({"attention_bias": True}, "sets attention_bias = True"),
        ({"mlp_bias": True}, "sets mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "sets quantization_config"),
        ({"num_local_experts": 8}, "sets num_local_experts"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "scales its rotary"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ({"rope_parameters": None, "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "0 < rope_low_turns <"),
        ({"rope_parameters": None, "rope_scaling": LLAMA3 | {"factor": None}}, "factor = None"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rope_scaling": [1]}, "an object is needed"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "positive number"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "scales its rotary"),
        ({"layer_types": ["sliding_attention"] * 3}, "windows are computed in Gemma's layers only"),
        ({"layer_types": ["full_attention", "sliding_attention", "x"]}, "every so many-th"),
        ({"layer_types": 3}, "a list of 3 kinds"),
    ],
)
def test_configs_that_are_refused(copy: Path, values: dict[str, Any], message: str) -> None:
    config = json.loads((copy / load.CONFIG).read_text())
    (copy / load.CONFIG).write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=message) as caught:
        load.read(copy, PLACES)
    assert "\n" not in str(caught.value)


def test_older_configs() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    tensors = [str(i) for i in range(9)]
    llama = sizes | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    config = hf_config.full(*hf_config.read(llama, tensors))
    assert (config["rope_theta"], config["rope_factor"], config["num_kv_heads"]) == (5e5, 4.0, 4)
    gemma = {"model_type": "gemma3", "text_config": sizes | {"sliding_window_pattern": 2, "sliding_window": 16}}
    config = hf_config.full(*hf_config.read(gemma, tensors))
    assert (config["window"], config["global_every"], config["rope_theta"]) == (16, 2, 1e6)
    assert config["vocab_size"] == 262208 and config["tied_embeddings"]
    with pytest.raises(UserError, match="lacks lm_head"):
        hf_config.read({"model_type": "mt5"}, tensors)
    with pytest.raises(UserError, match="rescales the input of a head of its own"):
        hf_config.read({"model_type": "t5", "tie_word_embeddings": False, "scale_decoder_outputs": True}, tensors)
    # What transformers 5 writes of a T5 1.1.
    newer = {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not hf_config.full(*hf_config.read(newer, [*tensors, "lm_head.weight"]))["tied_embeddings"]


def test_names_cover_what_transformers_saves_once() -> None:
    """No two leaves share a tensor, in any family."""
    decoder = {"vocab_size": 8, "emb_dim": 4, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "head_dim": 2}
    everything = {"qkv_bias": True, "qk_norm": True, "post_norms": True, "tied_embeddings": False}
    table = names.table("decoder", hf_config.full("decoder", decoder | {"mlp_dim": 6} | everything))
    tensors = [tensor for name in table for tensor in name.tensors]
    assert len(set(tensors)) == len(tensors) and len({name.leaf for name in table}) == len(table)


def test_pickles_are_not_opened(copy: Path) -> None:
    (copy / load.SINGLE).rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle files, which are not opened"):
        load.read(copy, PLACES)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        load.read(copy, PLACES)


def test_damaged_folders(copy: Path) -> None:
    """Config and weights with bits turned: loaded, or refused in one sentence."""
    rng, outcomes = random.Random(0), set()
    good = {name: (copy / name).read_bytes() for name in (load.CONFIG, load.SINGLE)}
    for _ in range(150):
        name = rng.choice(list(good))
        data = bytearray(good[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 3000))] ^= 1 << rng.randrange(8)
        (copy / name).write_bytes(data)
        try:
            load.read(copy, PLACES)
            outcomes.add("loaded")
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
        (copy / name).write_bytes(good[name])
    assert outcomes == {"loaded", "refused"}


@pytest.fixture(name="hub")
def _hub(copy: Path, tmp_path: Path) -> Path:
    """The hub's own cache: a snapshot of links to blobs."""
    repository = tmp_path / "hub" / "models--tiny--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in copy.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return snapshot


def test_hub(hub: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.parents[2]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    want = fingerprint(flat(copy)[0].placed.params)
    for path in ("hf://tiny/llama", "hf://tiny/llama@main", str(hub)):
        base = pretrained.load(path, Partitioner())
        assert (base.fingerprint, base.path) == (want, path)
    with pytest.raises(UserError, match="Cannot fetch hf://tiny/other"):
        pretrained.load("hf://tiny/other", Partitioner())
    for path in ("hf://tiny", "hf://../..//x", "hf://a/b@c d"):
        with pytest.raises(UserError, match="no address of a model"):
            pretrained.load(path, Partitioner())
    (hub / load.CONFIG).unlink()
    (hub / load.CONFIG).symlink_to(copy / load.CONFIG)
    with pytest.raises(UserError, match="leads to"):
        load.read(hub, PLACES)


def test_nothing_but_data_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((*args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("hf://org/name@v1.0") == tmp_path
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for address in ("hf://org/name/a/b.gguf", "hf://org/name@refs/pr/1/b.gguf"):
        assert locate(address) == tmp_path
    assert asked[1:] == [
        ("org/name", "a/b.gguf", {"revision": None}),
        ("org/name", "b.gguf", {"revision": "refs/pr/1"}),
    ]
    assert asked[0][0] == "org/name" and asked[0][1]["revision"] == "v1.0"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked[0][1]["allow_patterns"])


def test_bucket(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from etils import epath

    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    monkeypatch.setenv("PROMOT_CHECKPOINTS", str(tmp_path / "cache"))
    original = epath.Path
    monkeypatch.setattr(epath, "Path", lambda path: original(path.replace("gs://bucket", str(copy.parent))))
    base = pretrained.load("gs://bucket/llama", Partitioner())
    assert base.fingerprint == fingerprint(flat(copy)[0].placed.params)
    fetched = locate("gs://bucket/llama")
    assert [fetched] == list((tmp_path / "cache").iterdir()) and not (fetched / "pytorch_model.bin").exists()
    edit(copy, lambda state: state["model.norm.weight"].resize_(31))
    assert locate("gs://bucket/llama") != fetched
    with pytest.raises(UserError, match="gs://bucket/none holds neither"):
        pretrained.load("gs://bucket/none", Partitioner())
    gguf = tiny.write(tmp_path / "llama" / "tiny.gguf", tiny.tensors())
    found = pretrained.load("gs://bucket/llama/tiny.gguf", Partitioner()).fingerprint
    assert found == pretrained.load(str(gguf), Partitioner()).fingerprint
    (copy / load.CONFIG).unlink()
    with pytest.raises(UserError, match="holds neither a Hugging Face folder"):
        locate("gs://bucket/llama")
