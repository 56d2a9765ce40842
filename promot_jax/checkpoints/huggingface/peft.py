"""Soft prompts and LoRA as adapters of PEFT: a folder that `PeftModel.from_pretrained` loads on the base model."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from promot_jax import trees
from promot_jax.checkpoints.huggingface import names, safetensors
from promot_jax.checkpoints.huggingface.safetensors import Source
from promot_jax.errors import UserError
from promot_jax.params.lora import A, B, Lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TASK_TYPES = {"decoder": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
Config = Mapping[str, Any]


def write_prompt(folder: Path, family: str, config: Config, rows: np.ndarray, base: str) -> None:
    """Writes a soft prompt as prompt tuning; of an encoder-decoder model it is prepended to the encoder's input.

    Args:
        folder: that is there.
        family: "decoder" or "t5".
        config: of the model, with all fields (`huggingface.config.full`).
        rows: the soft prompt, `[length, embed]`.
        base: path or address of the model that it is loaded on.

    Raises:
        UserError: the prompt's rows are not as wide as the model's.
    """
    if rows.shape[1] != config["emb_dim"]:
        raise UserError(f"The soft prompt has rows of {rows.shape[1]}, the model of {config['emb_dim']}.")
    layers = config["num_layers"] if family == "decoder" else config["num_decoder_layers"]
    settings = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": config["num_heads"],
        "num_layers": layers,
        "prompt_tuning_init": "RANDOM",
    }
    _write(folder, family, base, settings, {"prompt_embeddings": Source(rows.shape, lambda: rows)})


def write_lora(folder: Path, family: str, config: Config, lora: trees.Tree, settings: Lora, base: str) -> None:
    """Writes LoRA.

    Args:
        folder: that is there.
        family: "decoder" or "t5".
        config: of the model, with all fields.
        lora: `params["lora"]`.
        settings: its rank and alpha.
        base: path or address of the model that it is loaded on.
    """
    flat = trees.flatten(lora)
    tensors: dict[str, Source] = {}
    modules = []
    for name in names.table(family, config):
        module = name.leaf.removesuffix("kernel")
        if not name.leaf.endswith("kernel") or module + A not in flat:
            continue
        for layer in range(names.layers(family, config, name.leaf)) if name.stacked else (None,):
            theirs = (name.tensors[0] if layer is None else name.of(layer)).removesuffix(".weight")
            modules.append(theirs)
            for part, side in ((A, "lora_A"), (B, "lora_B")):
                leaf = flat[module + part]
                shape = leaf.shape[-2:][::-1]
                source = Source(shape, functools.partial(_transposed, leaf, layer))
                tensors[f"base_model.model.{theirs}.{side}.weight"] = source
    values = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": modules, "bias": "none"}
    _write(folder, family, base, {"peft_type": "LORA", "lora_dropout": 0.0, **values}, tensors)


def _transposed(leaf: Any, layer: int | None) -> np.ndarray:
    return np.asarray(leaf if layer is None else leaf[layer]).T


def _write(folder: Path, family: str, base: str, settings: Config, tensors: Mapping[str, Source]) -> None:
    """The two files; adapters are float32, since they are small."""
    common = {"task_type": _TASK_TYPES[family], "base_model_name_or_path": base, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps({**settings, **common}, indent=2) + "\n", encoding="utf-8")
    safetensors.write(folder / TENSORS, tensors)
