"""Tiny random transformers models, saved as Hugging Face folders: what the tests of reading and writing them share."""

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
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
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
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3Text"}[kind]
        config = getattr(transformers, f"{name}Config")(**SIZES | options)
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    if kind in ("t5", "mt5"):  # real ones share the table whether or not the head has it too
        model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 10 if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


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
