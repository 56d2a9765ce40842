"""GGUF files of Gemma 3, Qwen 2 and Qwen 3: every tensor in its place; transformers makes the same models of them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from forward import target_logits

from promot_jax import trees
from promot_jax.checkpoints.gguf import load
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build
from promot_jax.models.batch_layout import Tokens, decoder_rows

LAYERS, VOCAB = 7, 40  # every sixth layer of Gemma is global: one is, and one follows
BASE = {"vocab_size": VOCAB, "emb_dim": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": LAYERS, "mlp_dim": 64}
CONFIGS = {
    "gemma3": DecoderConfig(
        **BASE, head_dim=16, rope_theta=1e6, norm_eps=1e-6, max_length=64, activation="gelu", qk_norm=True,
        norm_offset=1.0, post_norms=True, embedding_scale=True, window=8, global_every=6, local_rope_theta=1e4,
    ),
    "qwen2": DecoderConfig(**BASE, head_dim=8, rope_theta=1e6, norm_eps=1e-6, max_length=64, qkv_bias=True),
    "qwen3": DecoderConfig(
        **BASE, head_dim=16, rope_theta=1e6, norm_eps=1e-6, max_length=64, qk_norm=True, tied_embeddings=False
    ),
}  # fmt: skip
LAYER = {
    "attn_norm.weight": "pre_self_attention_layer_norm/scale", "attn_q.weight": "self_attention/query/kernel",
    "attn_k.weight": "self_attention/key/kernel", "attn_v.weight": "self_attention/value/kernel",
    "attn_q.bias": "self_attention/query/bias", "attn_k.bias": "self_attention/key/bias",
    "attn_v.bias": "self_attention/value/bias", "attn_output.weight": "self_attention/out/kernel",
    "attn_q_norm.weight": "self_attention/query_norm/scale", "attn_k_norm.weight": "self_attention/key_norm/scale",
    "post_attention_norm.weight": "post_self_attention_layer_norm/scale",
    "ffn_norm.weight": "pre_mlp_layer_norm/scale", "post_ffw_norm.weight": "post_mlp_layer_norm/scale",
    "ffn_gate.weight": "mlp/wi_0/kernel", "ffn_up.weight": "mlp/wi_1/kernel", "ffn_down.weight": "mlp/wo/kernel",
}  # fmt: skip


def read(path: Path) -> tuple[DecoderConfig, dict[str, Any], dict[str, Any]]:
    loaded = load.read(path, Partitioner())
    return loaded.config, loaded.placed.params, loaded.metadata


def metadata_of(arch: str) -> dict[str, Any]:
    config = CONFIGS[arch]
    said = {
        "block_count": LAYERS, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    if config.head_dim != 8:
        said |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.window:
        said |= {"attention.sliding_window": config.window}
    return {f"{arch}.{key}": value for key, value in said.items()}


def parameters(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Random ones by path, every leaf different from what a fresh model has."""
    noise = np.random.default_rng(0)
    shapes = trees.flatten(jax.eval_shape(build(config).init, jax.random.key(0)))
    scale = {path: 0.2 if len(leaf.shape) < 3 and "embedding" not in path else 0.3 for path, leaf in shapes.items()}
    return {
        path: (scale[path] * noise.normal(size=leaf.shape) + path.endswith("scale") * (1 - config.norm_offset)).astype(
            np.float32
        )
        for path, leaf in shapes.items()
    }


def stored(config: DecoderConfig, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters under GGUF's names and in its layout."""

    def convert(path: str, leaf: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(leaf.T if path.endswith("kernel") else leaf) + (
            np.float32(config.norm_offset) if path.endswith("scale") else np.float32(0)
        )

    found = {"token_embd.weight": "token_embedder/embedding", "output_norm.weight": "decoder/decoder_norm/scale"}
    if not config.tied_embeddings:
        found["output.weight"] = "decoder/logits_dense/kernel"
    weights = {name: convert(path, flat[path]) for name, path in found.items()}
    for name, path in LAYER.items():
        for i, leaf in enumerate(flat.get(f"decoder/layers/{path}", ())):
            weights[f"blk.{i}.{name}"] = convert(path, leaf)
    return weights


def write(folder: Path, arch: str, **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A file and the parameters in it; changes are metadata (None: left out)."""
    flat = parameters(CONFIGS[arch])
    metadata = metadata_of(arch) | {f"{arch}.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return tiny.write(folder / f"{arch}.gguf", stored(CONFIGS[arch], flat), metadata, arch=arch), flat


@pytest.mark.parametrize("arch", CONFIGS)
def test_round_trip(tmp_path: Path, arch: str) -> None:
    path, flat = write(tmp_path, arch)
    config, params, _ = read(path)
    assert config == CONFIGS[arch]
    found = trees.flatten(params)
    assert found.keys() == flat.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, flat[name], rtol=0, atol=1e-7 * (config.norm_offset != 0), err_msg=name)


@pytest.mark.parametrize("arch", CONFIGS)
def test_transformers_makes_the_same_model_of_it(tmp_path: Path, arch: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    path, _ = write(tmp_path, arch, vocab_size=VOCAB)
    said = loader.load_gguf_checkpoint(path)["config"]
    if arch == "gemma3":  # files do not say it, and transformers takes what the real models have
        said |= {"query_pre_attn_scalar": CONFIGS[arch].head_dim}
    else:  # it loses these on the way
        said |= {"head_dim": CONFIGS[arch].head_dim, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    settings = transformers.AutoConfig.for_model(**said)
    twin = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    state = loader.load_gguf_checkpoint(path, return_tensors=True, model_to_load=twin)["tensors"]
    assert set(twin.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}  # tied
    config, params, _ = read(path)
    row = np.random.default_rng(1).integers(0, VOCAB, 24).tolist()
    batch = decoder_rows([[Tokens(row[:1], row[1:])]], 24, 23)
    with torch.no_grad():
        theirs = twin(torch.tensor([row])).logits[0, :-1].numpy()
    ours = target_logits(build(config), params, None, batch)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("gemma3", {"attention.sliding_window": None}, "lacks the metadata 'gemma3.attention.sliding_window'"),
        ("gemma3", {"attention.sliding_window_pattern": 4}, "another pattern of sliding windows"),
        ("gemma3", {"rope.freq_base": None}, "lacks the metadata 'gemma3.rope.freq_base'"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3", {"rope.scaling.type": "yarn"}, "scaling.type = 'yarn'"),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, "positive float"),
        ("qwen2", {"attention.sliding_window": 8}, "sliding_window = 8"),
        ("qwen3", {"attention.key_length": 8, "attention.value_length": 8}, "wrong shape: blk.0.attn_q.weight"),
        ("qwen3", {"expert_count": 4}, "expert_count = 4"),
    ],
)
def test_what_does_not_fit_is_one_error(tmp_path: Path, arch: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, arch, **changes)[0])


def test_tensors_of_a_family_are_wanted_by_it_alone(tmp_path: Path) -> None:
    weights = stored(CONFIGS["gemma3"], parameters(CONFIGS["gemma3"]))
    del weights["blk.3.post_ffw_norm.weight"]
    with pytest.raises(UserError, match=r"missing: blk\.3\.post_ffw_norm\.weight"):
        read(tiny.write(tmp_path / "m.gguf", weights, metadata_of("gemma3"), arch="gemma3"))
    weights = stored(CONFIGS["qwen2"], parameters(CONFIGS["qwen2"]))
    weights["blk.0.attn_q_norm.weight"] = np.ones(8, np.float32)
    with pytest.raises(UserError, match=r"unexpected: blk\.0\.attn_q_norm\.weight"):
        read(tiny.write(tmp_path / "m.gguf", weights, metadata_of("qwen2"), arch="qwen2"))


def test_what_some_gemma_files_say_beside(tmp_path: Path) -> None:
    """Gemma 3 4B scales positions; newer files spell out what older ones leave to the reader."""
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 1e3}
    path, _ = write(tmp_path, "gemma3", **extra, **{"attention.sliding_window_pattern": 6})
    config = read(path)[0]
    assert (config.rope_factor, config.local_rope_theta, config.query_scale) == (8.0, 1e3, None)
