"""What GGUF files of each architecture hold: names of tensors and metadata, and what the decoder computes for it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from promot_jax.checkpoints.huggingface.names import Name, table
from promot_jax.models.decoder_config import DecoderConfig

# Our leaf -> its tensor in the file; "{}" is the layer. Files hold a vocabulary's table as `[vocab, emb]`.
_LAYER = {
    "pre_self_attention_layer_norm/scale": "attn_norm",
    "post_self_attention_layer_norm/scale": "post_attention_norm",
    "self_attention/query_norm/scale": "attn_q_norm",
    "self_attention/key_norm/scale": "attn_k_norm",
    "self_attention/query/kernel": "attn_q",
    "self_attention/key/kernel": "attn_k",
    "self_attention/value/kernel": "attn_v",
    "self_attention/out/kernel": "attn_output",
    "self_attention/query/bias": "attn_q",
    "self_attention/key/bias": "attn_k",
    "self_attention/value/bias": "attn_v",
    "pre_mlp_layer_norm/scale": "ffn_norm",
    "post_mlp_layer_norm/scale": "post_ffw_norm",
    "mlp/wi_0/kernel": "ffn_gate",
    "mlp/wi_1/kernel": "ffn_up",
    "mlp/wo/kernel": "ffn_down",
}
_MODEL = {
    "token_embedder/embedding": "token_embd",
    "decoder/decoder_norm/scale": "output_norm",
    "decoder/logits_dense/kernel": "output",
}
_TENSORS = _MODEL | {f"decoder/layers/{leaf}": f"blk.{{}}.{tensor}" for leaf, tensor in _LAYER.items()}


def names(config: DecoderConfig) -> Iterable[Name]:
    """Every leaf of a model with its tensor's name in a GGUF file."""
    for name in table("decoder", dataclasses.asdict(config)):
        kind = "bias" if name.leaf.endswith("bias") else "weight"
        yield name._replace(tensors=(f"{_TENSORS[name.leaf]}.{kind}",))


# Metadata below the architecture's name that we use, or that does not change what the model computes. Any other key
# that is set (experts, other rope scaling, windows, ...) would make the decoder compute something else: an error.
KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count", "vocab_size", "tensor_data_layout", "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}  # fmt: skip
# These may be set to what changes nothing.
SCALES = ("rope.scaling.factor", "rope.scale_linear", "logit_scale", "embedding_scale", "residual_scale")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files and models of one architecture differ from Llama's."""

    computes: Mapping[str, Any]  # fields of `DecoderConfig` that hold for every model of the architecture
    interleaved: bool = False  # whether query and key rows of the two rotary halves alternate
    windowed: bool = False  # whether a sliding window is read from the metadata
    theta: float | None = None  # base of the rotary frequencies where the file names none; None where it has to


# Files of Gemma 3 hold 1 + scale, our parameters scale.
_GEMMA3 = {"activation": "gelu", "qk_norm": True, "norm_offset": 1.0, "post_norms": True, "embedding_scale": True}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture({}, interleaved=True, theta=1e4),
    "qwen2": Architecture({"qkv_bias": True}),
    "qwen3": Architecture({"qk_norm": True}),
    "gemma3": Architecture(_GEMMA3 | {"global_every": 6}, windowed=True),
}
# Keys of windowed architectures, the second of which can only say what `computes` says.
WINDOW_KEYS = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
# Gemma 3 27B alone scales its queries by width over heads; its number of layers is all that tells it in a file.
GEMMA3_27B_LAYERS = 62
# Llama 3.1, 3.2 and 3.3 differ in nothing but the factor.
LLAMA3_ROPE: Mapping[str, Any] = {"rope_low_turns": 1.0, "rope_high_turns": 4.0, "rope_original_length": 8192}
