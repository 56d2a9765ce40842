"""What GGUF files of each architecture hold: names of tensors and metadata, and what the decoder computes for it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Tensors = Mapping[str, tuple[str, tuple[str, ...]]]

# Tensor of a layer in the file -> (our path below decoder/layers, shape as stored, (out, in), in sizes of the model).
_LAYER: Tensors = {
    "attn_norm.weight": ("pre_self_attention_layer_norm/scale", ("emb",)),
    "attn_q.weight": ("self_attention/query/kernel", ("q", "emb")),
    "attn_k.weight": ("self_attention/key/kernel", ("kv", "emb")),
    "attn_v.weight": ("self_attention/value/kernel", ("kv", "emb")),
    "attn_output.weight": ("self_attention/out/kernel", ("emb", "q")),
    "ffn_norm.weight": ("pre_mlp_layer_norm/scale", ("emb",)),
    "ffn_gate.weight": ("mlp/wi_0/kernel", ("mlp", "emb")),
    "ffn_up.weight": ("mlp/wi_1/kernel", ("mlp", "emb")),
    "ffn_down.weight": ("mlp/wo/kernel", ("emb", "mlp")),
}
_BIASES: Tensors = {
    "attn_q.bias": ("self_attention/query/bias", ("q",)),
    "attn_k.bias": ("self_attention/key/bias", ("kv",)),
    "attn_v.bias": ("self_attention/value/bias", ("kv",)),
}
_QK_NORMS: Tensors = {
    "attn_q_norm.weight": ("self_attention/query_norm/scale", ("head",)),
    "attn_k_norm.weight": ("self_attention/key_norm/scale", ("head",)),
}
_POST_NORMS: Tensors = {
    "post_attention_norm.weight": ("post_self_attention_layer_norm/scale", ("emb",)),
    "post_ffw_norm.weight": ("post_mlp_layer_norm/scale", ("emb",)),
}

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
    """How files of one architecture differ from Llama's, and what they hold beside it.

    Attributes:
        tensors: of a layer.
        computes: fields of `DecoderConfig` that hold for every model of the architecture.
        interleaved: whether query and key rows of the two rotary halves alternate.
        windowed: whether a sliding window is read from the metadata.
        theta: base of the rotary frequencies where the file names none; None where it has to.
    """

    tensors: Tensors
    computes: Mapping[str, Any]
    interleaved: bool = False
    windowed: bool = False
    theta: float | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_LAYER, {}, interleaved=True, theta=1e4),
    "qwen2": Architecture({**_LAYER, **_BIASES}, {"qkv_bias": True}),
    "qwen3": Architecture({**_LAYER, **_QK_NORMS}, {"qk_norm": True}),
    "gemma3": Architecture(
        {**_LAYER, **_QK_NORMS, **_POST_NORMS},
        {
            "activation": "gelu",
            "qk_norm": True,
            "norm_offset": 1.0,  # files hold 1 + scale, our parameters scale
            "post_norms": True,
            "embedding_scale": True,
            "global_every": 6,
        },
        windowed=True,
    ),
}
# Keys of windowed architectures, the second of which can only say what `computes` says.
WINDOW_KEYS = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
# Gemma 3 27B alone scales its queries by width over heads; its number of layers is all that tells it in a file.
GEMMA3_27B_LAYERS = 62
# Llama 3.1, 3.2 and 3.3 differ in nothing but the factor.
LLAMA3_ROPE: Mapping[str, Any] = {"rope_low_turns": 1.0, "rope_high_turns": 4.0, "rope_original_length": 8192}
