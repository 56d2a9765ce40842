"""Hugging Face's config.json and our configs, both ways: what a model computes must be the same on either side."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from promot_jax.errors import UserError
from promot_jax.models import CONFIGS

Json = dict[str, Any]

# What a run chooses, and no checkpoint knows.
_OF_A_RUN = ("dropout_rate", "dtype", "remat", "attention")
_DEFAULTS: dict[str, Json] = {
    family: {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.name not in _OF_A_RUN
    }
    for family, config in CONFIGS.items()
}
# Keys that are used, and what transformers takes where config.json does not say. Sizes: ours -> theirs.
_SIZES = {
    "vocab_size": "vocab_size", "emb_dim": "hidden_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "num_layers": "num_hidden_layers", "head_dim": "head_dim",
    "mlp_dim": "intermediate_size", "max_length": "max_position_embeddings",
}  # fmt: skip
_T5_SIZES = {
    "vocab_size": "vocab_size", "emb_dim": "d_model", "num_heads": "num_heads", "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers", "head_dim": "d_kv", "mlp_dim": "d_ff",
    "relative_buckets": "relative_attention_num_buckets", "relative_max_distance": "relative_attention_max_distance",
}  # fmt: skip
_LLAMA: Json = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 1e4,
    "rope_scaling": None, "rope_parameters": None, "original_max_position_embeddings": None, "layer_types": None,
}  # fmt: skip
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_GEMMA2 = {key: value for key, value in _LLAMA.items() if key != "hidden_act"} | {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = {key: value for key, value in _GEMMA2.items() if key != "attn_logit_softcapping"} | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "final_logit_softcapping": None, "sliding_window_pattern": 6,
}  # fmt: skip
_T5: Json = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": None,
    "num_heads": 8, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "dense_act_fn": None, "is_gated_act": None,
    "tie_word_embeddings": True, "scale_decoder_outputs": ...,  # as the embeddings are tied
}  # fmt: skip
# Other names of T5's keys (`attribute_map`): where both are there, transformers takes these.
_T5_ALIASES = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv",
}  # fmt: skip
_T5 |= dict.fromkeys(_T5_ALIASES, ...)  # as the plain key
USED: dict[str, Json] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "t5": _T5,
    "mt5": _T5
    | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
}
_ENCODER_DECODERS = ("t5", "mt5")
# Set to anything but these, a config asks for what none of our models computes; or what transformers, which reads
# the last ones and does not use them, computes otherwise than the config says. Any other key changes no computation.
_OF_ALL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False), "mlp_bias": (None, False), "use_sliding_window": (None, False),
    "use_bidirectional_attention": (None, False), "quantization_config": (None,), "partial_rotary_factor": (None, 1.0),
    "num_experts": (None, 0), "num_local_experts": (None, 0), "is_decoder": (None, False),
    "add_cross_attention": (None, False), "tie_encoder_decoder": (None, False), "compression_config": (None,),
    "pruned_heads": (None, {}), "scalable_attention": (None, False),
}  # fmt: skip
NEUTRAL = {
    kind: _OF_ALL | ({"decoder_start_token_id": (None, 0)} if kind in _ENCODER_DECODERS else {})
    | {"is_encoder_decoder": (None, kind in _ENCODER_DECODERS)}
    for kind in USED
}  # fmt: skip
NEUTRAL["gemma2"] |= {"sliding_window_pattern": (None, 2)}
NEUTRAL["gemma3_text"] |= {"attn_logit_softcapping": (None,)}
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"rope_low_turns": "low_freq_factor", "rope_high_turns": "high_freq_factor"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_T5_ACTIVATIONS = {(False, "relu"): ("relu",), (True, "gelu_new"): ("gelu", "linear")}  # gated, activation -> ours


def full(family: str, config: Any) -> Json:
    """All fields of a config that a checkpoint knows, given as a dataclass or as keyword arguments."""
    given = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    return {key: value for key, value in (_DEFAULTS[family] | given).items() if key not in _OF_A_RUN}


class _Reader:
    """Typed values of a config.json; wrong ones, null too, are one sentence."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = {**defaults, **values}, origin

    def fail(self, key: str, need: str) -> UserError:
        return UserError(f"{self.origin} has {key} = {repr(self.values.get(key))[:80]}; {need}.")

    def whole(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 < value < 1 << 40:
            raise self.fail(key, "a positive whole number is needed")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf or value > 1e30:  # type: ignore[operator]
            raise self.fail(key, "a positive number is needed")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str) -> bool:
        if not isinstance(value := self.values.get(key), bool):
            raise self.fail(key, "true or false is needed")
        return value


def read(config: Any, tensors: Collection[str], origin: str = "config.json") -> tuple[str, Json]:
    """Maps a config.json.

    Args:
        config: its content.
        tensors: names of the model's tensors; they bound the layers and say whether a head of its own is there.
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
    if not isinstance(kind, str) or kind not in USED:
        raise UserError(
            f"{origin} describes a model of type {str(kind)[:80]!r}; these are read: {', '.join(sorted(USED))}."
        )
    for key, neutral in NEUTRAL[kind].items():
        if config.get(key) not in neutral:
            raise UserError(f"{origin} sets {key} = {repr(config[key])[:80]}, which our models do not compute.")
    family = family_of(kind)
    build = _read_t5 if family == "t5" else _read_decoder
    kwargs = build(kind, _Reader(config, USED[kind], origin), tensors)
    CONFIGS[family](**kwargs)  # raises for sizes that do not fit together
    return family, {key: value for key, value in kwargs.items() if _DEFAULTS[family].get(key, ...) != value}


def family_of(kind: Any) -> str:
    """The family of a `model_type`: "t5" or "decoder"."""
    return "t5" if kind in _ENCODER_DECODERS else "decoder"


def _sizes(reader: _Reader, sizes: Mapping[str, str], tensors: Collection[str]) -> Json:
    found = {ours: reader.whole(theirs) for ours, theirs in sizes.items()}
    for layers in (found[key] for key in found if key.endswith("_layers")):
        if layers > len(tensors):
            raise UserError(
                f"{reader.origin} declares {layers} layers, the folder holds {len(tensors)} tensors; fetch it again."
            )
    return found


def _read_decoder(kind: str, reader: _Reader, tensors: Collection[str]) -> Json:
    values = reader.values
    emb, heads = reader.whole("hidden_size"), reader.whole("num_attention_heads")
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        if emb % heads:
            raise UserError(f"{reader.origin} has width {emb}, which does not divide into {heads} heads.")
        values["head_dim"] = emb // heads
    gemma, third = kind in ("gemma2", "gemma3_text"), kind == "gemma3_text"
    activation = values[key := "hidden_activation" if gemma else "hidden_act"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise reader.fail(key, f"these activations are computed: {', '.join(_ACTIVATIONS)}")
    kwargs = _sizes(reader, _SIZES, tensors) | {
        "norm_eps": reader.number("rms_norm_eps"),
        "tied_embeddings": reader.flag("tie_word_embeddings"),
        "activation": _ACTIVATIONS[activation],
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind in ("gemma3_text", "qwen3"),
    }
    if gemma:
        kwargs |= {"post_norms": True, "norm_offset": 1.0, "embedding_scale": True}
        kwargs["query_scale"] = reader.number("query_pre_attn_scalar") ** -0.5
        caps = {"attention_softcap": "attn_logit_softcapping", "logits_softcap": "final_logit_softcapping"}
        kwargs |= {
            ours: reader.number(cap) for ours, cap in caps.items() if cap in USED[kind] and values[cap] is not None
        }
    rope = _rope(reader, "full_attention" if third else "", "rope_theta")
    return kwargs | rope | _windows(reader, kind)


def _rope(reader: _Reader, layer_type: str, key: str) -> Json:
    """Base of the rotary frequencies and how they are scaled, read as transformers does.

    Of `rope_scaling` and the newer `rope_parameters` the former replaces the latter whole, but in Gemma 3, whose
    parameters are per `layer_type`, it only updates those of global layers.
    """
    parameters, scaling = reader.values["rope_parameters"] or {}, reader.values["rope_scaling"] or {}
    for name, value in {"rope_parameters": parameters, "rope_scaling": scaling}.items():
        if not isinstance(value, dict) or not isinstance(value.get(layer_type) or {}, dict):
            raise reader.fail(name, "an object is needed")
    merged = scaling or parameters
    if layer_type:
        merged = parameters.get(layer_type) or {"rope_type": "default"}
        merged = merged | (scaling if layer_type == "full_attention" else {})
    rope_type = merged.get("rope_type", merged.get("type", "default"))
    computed = ("default", "linear") if layer_type else ("default", "linear", "llama3")
    known = {"rope_type", "type", "rope_theta", "factor", _ORIGINAL}
    extra = merged.keys() - known - (set(_LLAMA3.values()) if rope_type == "llama3" else set())
    if (
        rope_type not in computed
        or merged.get("type", rope_type) != rope_type
        or any(merged[name] not in (None, 1, 1.0) for name in extra)
    ):
        raise UserError(
            f"{reader.origin} scales its rotary positions by {str(merged)[:120]}; {', '.join(computed)} are computed."
        )
    originals = (reader.values[_ORIGINAL], merged.get(_ORIGINAL), reader.values["max_position_embeddings"])
    original = next(length for length in originals if length is not None)
    inner = _Reader({"rope_theta": reader.values[key]} | merged | {_ORIGINAL: original}, {}, reader.origin)
    rope: Json = {"rope_theta": inner.number("rope_theta")}
    if rope_type != "default":
        rope["rope_factor"] = inner.number("factor")
    if rope_type == "llama3":
        rope |= {ours: inner.number(theirs) for ours, theirs in _LLAMA3.items()}
        rope["rope_original_length"] = inner.whole(_ORIGINAL)
    return rope


def _windows(reader: _Reader, kind: str) -> Json:
    """Which layers attend to a window only."""
    layers, types = reader.whole("num_hidden_layers"), reader.values["layer_types"]
    if types is None:  # Gemma 2 alternates
        pattern = reader.whole("sliding_window_pattern") if kind == "gemma3_text" else 2 if kind == "gemma2" else 1
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(not isinstance(kind, str) for kind in types):
        raise reader.fail("layer_types", f"a list of {layers} kinds is needed")
    every = types.index("full_attention") + 1 if "full_attention" in types else layers + 1
    if types != ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]:
        raise reader.fail("layer_types", "full attention is computed in every so many-th layer, from the first such on")
    if every == 1:
        return {}
    if kind not in ("gemma2", "gemma3_text"):
        raise reader.fail("layer_types", "windows are computed in Gemma's layers only")
    local = ("sliding_attention", "rope_local_base_freq") if kind == "gemma3_text" else ("", "rope_theta")
    rope = _rope(reader, *local)
    if rope.get("rope_factor", 1) != 1:
        raise UserError(f"{reader.origin} scales the positions of its local layers, which our models do not compute.")
    return {"window": reader.whole("sliding_window"), "global_every": every, "local_rope_theta": rope["rope_theta"]}


def _read_t5(kind: str, reader: _Reader, tensors: Collection[str]) -> Json:
    values = reader.values
    if values["num_decoder_layers"] is None:
        values["num_decoder_layers"] = values["num_layers"]
    for alias, key in _T5_ALIASES.items():
        if values[alias] is not ...:
            values[key] = values[alias]
    # "gated-gelu" is an activation and whether it gates; where both are said, these are what transformers computes.
    gated, _, activation = str(values["feed_forward_proj"]).rpartition("-")
    activation = "gelu_new" if (gated, activation) == ("gated", "gelu") else activation
    activation = activation if values["dense_act_fn"] is None else values["dense_act_fn"]
    is_gated = gated == "gated" if values["is_gated_act"] is None else values["is_gated_act"]
    feed_forward = (is_gated, activation)
    if gated not in ("", "gated") or feed_forward not in [*_T5_ACTIVATIONS]:
        key = "feed_forward_proj" if values["dense_act_fn"] is None else "dense_act_fn"
        raise reader.fail(key, "'relu' and 'gated-gelu' are computed")
    # T5 1.0 shares its head with the embedding and rescales the states before it; all others do neither. Newer
    # transformers say "tied" of every model, and by `scale_decoder_outputs` which of them rescales.
    tied, own_head = reader.flag("tie_word_embeddings"), "lm_head.weight" in tensors
    scaled = tied and kind == "t5"
    if values["scale_decoder_outputs"] is not ... and kind == "t5":
        scaled = reader.flag("scale_decoder_outputs")
    if scaled and not tied:
        raise UserError(f"{reader.origin} rescales the input of a head of its own, which our models do not compute.")
    if not scaled and not own_head:
        raise UserError(
            f"{reader.origin} describes a model with a head of its own, but the folder lacks lm_head.weight."
        )
    return _sizes(reader, _T5_SIZES, tensors) | {
        "mlp_activations": _T5_ACTIVATIONS[feed_forward],
        "tied_embeddings": scaled,
        "norm_eps": reader.number("layer_norm_epsilon"),
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
        **{theirs: config[ours] for ours, theirs in _SIZES.items()},
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": scaling,
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
        **{theirs: config[ours] for ours, theirs in _T5_SIZES.items()},
        "layer_norm_epsilon": config["norm_eps"],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": config["tied_embeddings"],
        "decoder_start_token_id": 0,
    }
