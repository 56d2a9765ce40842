"""Every family and variant as a tiny random model of transformers: one table for parity, reading and export."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SIZES = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": 272, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Windows are shorter than the inputs of tests, and layers of either kind come twice.
GEMMA = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True}
# The model's type in transformers, and what its config says beside the sizes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5 1.0": ("t5", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "T5 1.1": ("t5", GATED),
    "mT5": ("mt5", GATED | {"num_heads": 6, "relative_attention_num_buckets": 12}),
    "Flan-T5": ("t5", GATED | {"num_heads": 6, "num_layers": 3}),
    "ByT5": ("t5", GATED | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1}),
    "Llama": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Llama untied": ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
    "Gemma 2": (
        "gemma2", GEMMA | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0}
    ),
    "Gemma 3": (
        "gemma3_text",
        GEMMA
        | {
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "Qwen 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 2.5 untied": ("qwen2", {"tie_word_embeddings": False}),
    "Qwen 3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 20}),
}  # fmt: skip


def build(kind: str, **options: Any) -> Any:
    """A model with random weights; norms and biases too, which transformers starts at constants."""
    if kind in ("t5", "mt5"):
        name = {"t5": "T5", "mt5": "MT5"}[kind]
        config = getattr(transformers, f"{name}Config")(**T5_SIZES | options)
        # It says True of every model when it is built.
        config.tie_word_embeddings = options.get("tie_word_embeddings", True)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    else:
        names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
        name = names.get(kind, "Llama")
        config = getattr(transformers, f"{name}Config")(**SIZES | options)
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    if kind in ("t5", "mt5"):  # real ones share the table whether or not the head has it too
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Sizes with which outputs hang on all layers and on the inputs.
            wide = 0.5 if "embed" in name or "shared" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(1 + noise / 5 if parameter.ndim == 1 else noise * wide)
    return model.eval()


def variant(name: str) -> Any:
    """The model of a row of `VARIANTS`."""
    kind, options = VARIANTS[name]
    return build(kind, **options, attn_implementation="eager")


def tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer of fewer tokens than the models have rows."""
    names = [*tiny.TOKENS[:3], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=names[0], bos_token=names[1], pad_token=names[0]
    )
    fast.save_pretrained(folder)


def save(folder: Path, kind: str, **options: Any) -> Any:
    """Builds a model, saves it with a tokenizer, and returns it."""
    model = build(kind, **options)
    model.save_pretrained(folder)
    tokenizer(folder)
    return model


def leaves(model: Any) -> dict[str, np.ndarray]:
    """A transformers model's tensors by name."""
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder as a user of transformers gets them."""
    seq2seq = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def generate(model: Any, row: list[int], **options: Any) -> list[int]:
    """The new tokens of all sequences; without a cache where it has no room for a decoder deeper than the encoder."""
    ids = torch.tensor([row])
    t5 = model.config.is_encoder_decoder
    cached = not t5 or model.config.num_decoder_layers <= model.config.num_layers
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "use_cache": cached} | options
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return [int(i) for sample in out for i in sample[1 if t5 else len(row) :]]
