"""Hugging Face's config.json and our configs, both ways: what a model computes must be the same on either side."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from promot_jax.errors import UserError
from promot_jax.models import CONFIGS

Json = dict[str, Any]

# What a run chooses, and no checkpoint knows.
_OF_A_RUN = ("dropout_rate", "dtype", "remat")
_DEFAULTS: dict[str, Json] = {
    family: {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.name not in _OF_A_RUN
    }
    for family, config in CONFIGS.items()
}
# What transformers takes when config.json does not say.
_DECODERS: dict[str, Json] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "rope_theta": 1e4, "hidden_act": "silu",
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "rope_theta": 1e4, "hidden_act": "silu",
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": 1e4, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_theta": 1e6, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "rope_local_base_freq": 1e4,
    },
}  # fmt: skip
_DECODERS["qwen3"] = _DECODERS["qwen2"] | {"head_dim": 128}
_ENCODER_DECODERS = ("t5", "mt5")
_T5: Json = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "tie_word_embeddings": True,
}  # fmt: skip
_MT5 = _T5 | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
# Set to anything but these, a config asks for what none of our models computes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False), "mlp_bias": (None, False), "use_sliding_window": (None, False),
    "use_bidirectional_attention": (None, False), "quantization_config": (None,), "partial_rotary_factor": (None, 1.0),
    "num_experts": (None, 0), "num_local_experts": (None, 0), "is_decoder": (None, False),
    "compression_config": (None,), "pruned_heads": (None, {}),
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"rope_low_turns": "low_freq_factor", "rope_high_turns": "high_freq_factor"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}


def full(family: str, config: Any) -> Json:
    """All fields of a config that a checkpoint knows, given as a dataclass or as keyword arguments."""
    given = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    return {key: value for key, value in (_DEFAULTS[family] | given).items() if key not in _OF_A_RUN}


class _Reader:
    """Typed values of a config.json; wrong ones are one sentence."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self.values = dict(defaults) | {key: value for key, value in values.items() if value is not None}
        self.origin = origin

    def fail(self, key: str, wanted: str) -> UserError:
        shown = repr(self.values.get(key))[:80]
        return UserError(f"{self.origin} has {key} = {shown}; {wanted}.")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 40:
            raise self.fail(key, "a positive whole number is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf or value > 1e30:  # type: ignore[operator]
            raise self.fail(key, "a positive number is needed")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false is needed")
        return value


def read(config: Any, tensors: Collection[str], origin: str = "config.json") -> tuple[str, Json]:
    """Maps a config.json.

    Args:
        config: its content.
        tensors: names of the model's tensors, as `hf.canonical` gives them; they bound the layers and say whether a
            head of its own is there.
        origin: for messages.

    Returns:
        The family, "decoder" or "t5", and the keyword arguments of its config that differ from their defaults.

    Raises:
        UserError: the config is damaged, or asks for what our models do not compute.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "gemma3" and isinstance(config.get("text_config"), dict):  # with a vision tower, which is left out
        outer = {key: config[key] for key in ("quantization_config", "tie_word_embeddings") if key in config}
        config = outer | config["text_config"]
        kind = "gemma3_text"
    if not isinstance(kind, str) or kind not in (*_DECODERS, *_ENCODER_DECODERS):
        known = ", ".join(sorted((*_DECODERS, *_ENCODER_DECODERS)))
        raise UserError(f"{origin} describes a model of type {str(kind)[:80]!r}; these are read: {known}.")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise UserError(f"{origin} sets {key} = {repr(config[key])[:80]}, which our models do not compute.")
    family = "t5" if kind in _ENCODER_DECODERS else "decoder"
    build = _read_t5 if family == "t5" else _read_decoder
    kwargs = build(kind, config, tensors, origin)
    CONFIGS[family](**kwargs)  # raises for sizes that do not fit together
    return family, {key: value for key, value in kwargs.items() if _DEFAULTS[family].get(key, ...) != value}


def _check_layers(layers: int, tensors: Collection[str], origin: str) -> int:
    if layers > len(tensors):
        raise UserError(f"{origin} declares {layers} layers, the folder holds {len(tensors)} tensors; fetch it again.")
    return layers


def _activation(reader: _Reader, key: str) -> str:
    value = reader.values.get(key)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise reader.fail(key, f"these activations are computed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _read_decoder(kind: str, config: Json, tensors: Collection[str], origin: str) -> Json:
    reader = _Reader(config, _DECODERS[kind], origin)
    emb, heads = reader.whole("hidden_size"), reader.whole("num_attention_heads")
    if "head_dim" not in reader.values and emb % heads:
        raise UserError(f"{origin} has width {emb}, which does not divide into {heads} heads.")
    layers = _check_layers(reader.whole("num_hidden_layers"), tensors, origin)
    gemma = kind in ("gemma2", "gemma3_text")
    kwargs: Json = {
        "vocab_size": reader.whole("vocab_size"),
        "emb_dim": emb,
        "num_heads": heads,
        "num_kv_heads": reader.whole("num_key_value_heads", heads),
        "num_layers": layers,
        "head_dim": reader.whole("head_dim", emb // heads),
        "mlp_dim": reader.whole("intermediate_size"),
        "norm_eps": reader.number("rms_norm_eps"),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
        "max_length": reader.whole("max_position_embeddings"),
        "activation": _activation(reader, "hidden_activation" if gemma else "hidden_act"),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind in ("gemma3_text", "qwen3"),
    }
    if gemma:
        kwargs |= {"post_norms": True, "norm_offset": 1.0, "embedding_scale": True}
        kwargs["query_scale"] = reader.number("query_pre_attn_scalar") ** -0.5
        caps = {"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"}
        for ours, theirs in caps.items():  # null is none, whatever the default
            kwargs[ours] = reader.number(theirs) if config.get(theirs, _DECODERS[kind].get(theirs)) else 0.0
    rope = _rope(reader, config, "full_attention" if kind == "gemma3_text" else "", "rope_theta")
    return kwargs | rope | _windows(reader, config, layers, kind)


def _rope(reader: _Reader, config: Json, layer_type: str, key: str) -> Json:
    """Base of the rotary frequencies and how they are scaled; newer files keep both in one object."""
    given = config.get("rope_parameters") or {}
    if isinstance(given, dict) and layer_type:
        given = given.get(layer_type) or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(given, dict) or not isinstance(scaling, dict):
        raise reader.fail("rope_parameters" if scaling == {} else "rope_scaling", "an object is needed")
    if layer_type == "sliding_attention":
        scaling = {}  # it speaks of the global layers
    merged = given | ({"rope_type": scaling["type"]} if "type" in scaling else {}) | scaling
    rope_type = merged.get("rope_type", merged.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor", _ORIGINAL}
    extra = merged.keys() - known - (set(_LLAMA3.values()) if rope_type == "llama3" else set())
    if rope_type not in ("default", "linear", "llama3") or any(merged[name] not in (None, 1, 1.0) for name in extra):
        raise UserError(
            f"{reader.origin} scales its rotary positions by {str(merged)[:120]}; 'default', 'linear' and 'llama3' are "
            "computed."
        )
    inner = _Reader(merged, {}, reader.origin)
    rope: Json = {"rope_theta": inner.number("rope_theta", reader.number(key))}
    if rope_type != "default":
        rope["rope_factor"] = inner.number("factor")
    if rope_type == "llama3":
        rope |= {ours: inner.number(theirs) for ours, theirs in _LLAMA3.items()}
        rope["rope_original_length"] = inner.whole(_ORIGINAL)
    return rope


def _windows(reader: _Reader, config: Json, layers: int, kind: str) -> Json:
    """Which layers attend to a window only."""
    gemma = kind in ("gemma2", "gemma3_text")
    pattern = reader.whole("sliding_window_pattern", 6) if gemma else 1
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(not isinstance(kind, str) for kind in types):
        raise reader.fail("layer_types", f"a list of {layers} kinds is needed")
    every = types.index("full_attention") + 1 if "full_attention" in types else layers + 1
    if types != ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]:
        raise reader.fail("layer_types", "full attention is computed in every so many-th layer, from the first such on")
    if every == 1:
        return {}
    if not gemma:
        raise reader.fail("layer_types", "windows are computed in Gemma's layers only")
    local = ("sliding_attention", "rope_local_base_freq") if kind == "gemma3_text" else ("", "rope_theta")
    rope = _rope(reader, config, *local)
    if rope.get("rope_factor", 1) != 1:
        raise UserError(f"{reader.origin} scales the positions of its local layers, which our models do not compute.")
    return {"window": reader.whole("sliding_window"), "global_every": every, "local_rope_theta": rope["rope_theta"]}


def _read_t5(kind: str, config: Json, tensors: Collection[str], origin: str) -> Json:
    reader = _Reader(config, _MT5 if kind == "mt5" else _T5, origin)
    layers = _check_layers(reader.whole("num_layers"), tensors, origin)
    activations = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
    feed_forward = reader.values["feed_forward_proj"]
    if not isinstance(feed_forward, str) or feed_forward not in activations:
        raise reader.fail("feed_forward_proj", "'relu' and 'gated-gelu' are computed")
    if config.get("scalable_attention"):
        raise reader.fail("scalable_attention", "our models do not compute it")
    # T5 1.0 shares its head with the embedding and rescales the states before it; all others do neither. Newer
    # transformers say "tied" of every model, and by `scale_decoder_outputs` which of them rescales.
    tied, own_head = reader.flag("tie_word_embeddings"), "lm_head.weight" in tensors
    scaled = tied and kind == "t5"
    if "scale_decoder_outputs" in reader.values and kind == "t5":
        scaled = reader.flag("scale_decoder_outputs")
    if scaled and not tied:
        raise UserError(f"{origin} rescales the input of a head of its own, which our models do not compute.")
    if not scaled and not own_head:
        raise UserError(f"{origin} describes a model with a head of its own, but the folder lacks lm_head.weight.")
    return {
        "vocab_size": reader.whole("vocab_size"),
        "emb_dim": reader.whole("d_model"),
        "num_heads": reader.whole("num_heads"),
        "num_encoder_layers": layers,
        "num_decoder_layers": _check_layers(reader.whole("num_decoder_layers", layers), tensors, origin),
        "head_dim": reader.whole("d_kv"),
        "mlp_dim": reader.whole("d_ff"),
        "mlp_activations": activations[feed_forward],
        "tied_embeddings": scaled,
        "norm_eps": reader.number("layer_norm_epsilon"),
        "relative_buckets": reader.whole("relative_attention_num_buckets"),
        "relative_max_distance": reader.whole("relative_attention_max_distance"),
    }


def write(family: str, config: Any) -> Json:
    """Returns the config.json of a model: what `read` maps back to the same config.

    Raises:
        UserError: no model type of transformers computes the same.
    """
    builders: dict[str, Callable[[Json], Json]] = {"decoder": _write_decoder, "t5": _write_t5}
    return builders[family](full(family, config))


def _write_decoder(config: Json) -> Json:
    gemma = config["post_norms"]
    if config["qk_norm"]:
        kind = "gemma3_text" if gemma else "qwen3"
    else:
        kind = "gemma2" if gemma else "qwen2" if config["qkv_bias"] else "llama"
    names = {value: key for key, value in _ACTIVATIONS.items() if key not in ("swish", "gelu_new")}
    scaling = None if config["rope_factor"] == 1 else {"rope_type": "linear", "factor": config["rope_factor"]}
    if config["rope_original_length"]:
        scaling = {"rope_type": "llama3", "factor": config["rope_factor"]} | {
            theirs: config[ours] for ours, theirs in (_LLAMA3 | {"rope_original_length": _ORIGINAL}).items()
        }
    values: Json = {
        "architectures": [f"{kind.removesuffix('_text').capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["emb_dim"],
        "intermediate_size": config["mlp_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": scaling,
        "max_position_embeddings": config["max_length"],
        "tie_word_embeddings": config["tied_embeddings"],
        "hidden_activation" if gemma else "hidden_act": names[config["activation"]],
    }
    if gemma:
        scale = config["query_scale"] or config["head_dim"] ** -0.5
        every = config["global_every"] if config["window"] else 1
        values |= {
            "query_pre_attn_scalar": _whole_if_close(scale**-2),
            "attn_logit_softcapping": config["attention_softcap"] or None,
            "final_logit_softcapping": config["logits_softcap"] or None,
            "sliding_window": config["window"] or config["max_length"],
            "layer_types": [
                "sliding_attention" if (i + 1) % every else "full_attention" for i in range(config["num_layers"])
            ],
        }
    if kind == "gemma3_text":
        values["rope_local_base_freq"] = config["local_rope_theta"]
    tensors = [f"{i}" for i in range(config["num_layers"])]
    back = full(*read(values, tensors))
    for key in back:
        if config.get(key) != back[key] and not (key == "query_scale" and gemma):
            raise UserError(f"A {kind} model of transformers cannot have {key} = {config.get(key)}: no export.")
    return values


def _whole_if_close(value: float) -> int | float:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _write_t5(config: Json) -> Json:
    gated = len(config["mlp_activations"]) == 2
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config["vocab_size"],
        "d_model": config["emb_dim"],
        "d_kv": config["head_dim"],
        "d_ff": config["mlp_dim"],
        "num_layers": config["num_encoder_layers"],
        "num_decoder_layers": config["num_decoder_layers"],
        "num_heads": config["num_heads"],
        "relative_attention_num_buckets": config["relative_buckets"],
        "relative_attention_max_distance": config["relative_max_distance"],
        "layer_norm_epsilon": config["norm_eps"],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": config["tied_embeddings"],
        "decoder_start_token_id": 0,
    }
