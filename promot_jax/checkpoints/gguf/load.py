"""GGUF files to our parameter tree: every tensor accounted for, rows dequantised straight to their place.

Read are decoder-only models of architecture `llama` (Llama, SmolLM2 and others), `gemma3` (its text part), `qwen2`
(2 and 2.5) and `qwen3`; `architectures.py` has what differs between them. Tests hold the result against transformers.
"""

import dataclasses
import functools
import os
from collections.abc import Collection
from typing import Any

import numpy as np

from promot_jax.checkpoints import placement
from promot_jax.checkpoints.gguf import architectures
from promot_jax.checkpoints.gguf.file import File, opened
from promot_jax.checkpoints.huggingface import names as hf_names
from promot_jax.checkpoints.placement import Reader
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import layers
from promot_jax.models.decoder_config import DecoderConfig

# What the rotary frequencies are divided by, one number each: no parameter, but part of the config (Llama 3.1).
ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model from a file."""

    config: DecoderConfig
    placed: placement.Placed
    metadata: dict[str, Any]  # from which `TokenizerVocabulary.from_gguf` makes the tokenizer


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a file's metadata: str, int, float, bool, list of str, or numpy array per key.

    Raises:
        UserError: the file is missing or damaged.
    """
    with opened(path) as file:
        return file.metadata


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the keyword arguments of the DecoderConfig that fits a file.

    Raises:
        UserError: the file is missing or damaged, of another architecture, or asks for what the decoder lacks.
    """
    with opened(path) as file:
        return _config(file)


def read(path: str | os.PathLike[str], partitioner: Partitioner, without: Collection[str] = ()) -> Loaded:
    """Reads a model, each tensor straight to its place; leaves `without` are not kept (`placement.load`).

    The file may have any quantisation that the `gguf` package can dequantise.

    Raises:
        UserError: as `read_config`; or tensors are missing, unexpected, or of the wrong shape or values.
    """
    with opened(path) as file:
        config = DecoderConfig(**_config(file))
        arch = architectures.ARCHITECTURES[file.metadata["general.architecture"]]
        table = list(architectures.names(config))
        sources = hf_names.sources(table, "decoder", dataclasses.asdict(config), file.tensors)
        stored = {key: placement.Stored(one.shape, one.kind.name, one.readable) for key, one in file.tensors.items()}
        hf_names.check(file.name, table, sources, stored, lambda key: key == ROPE_FACTORS)
        entries = hf_names.entries(table, sources, functools.partial(_reader, file, config, arch))
        return Loaded(config, placement.load(entries, partitioner, without), file.metadata)


def _short(value: Any) -> str:
    return "a list" if np.ndim(value) else repr(value)[:80]


def _config(file: File) -> dict[str, Any]:
    name, metadata, tensors = file.name, file.metadata, file.tensors
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in architectures.ARCHITECTURES:
        read = ", ".join(architectures.ARCHITECTURES)
        raise UserError(f"{name} holds a model of architecture {_short(family)}; {read} are read from GGUF.")
    arch = architectures.ARCHITECTURES[family]
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise UserError(f"{name} is one part of several; merge the parts into one GGUF file first.")
    linear = str(metadata.get(f"{family}.rope.scaling.type")) == "linear"
    known = architectures.KNOWN_KEYS | (architectures.WINDOW_KEYS if arch.windowed else set())
    known |= {"rope.scaling.type", "rope.scaling.factor"} if linear else set()
    for key, value in metadata.items():
        short = key.removeprefix(f"{family}.")
        neutral = (0, 1) if short in architectures.SCALES else (0, "none")
        if key != short and short not in known and not (np.ndim(value) == 0 and value in neutral):
            raise UserError(f"{name} sets {key[:80]} = {_short(value)}, which the decoder does not compute.")

    def number(key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
        value: Any = metadata.get(f"{family}.{key}", default)
        if value is None:
            raise UserError(f"{name} lacks the metadata '{family}.{key}'; convert the model again.")
        if isinstance(value, bool) or not isinstance(value, kind) or not (0 < value < 2**40):
            raise UserError(f"{name} has {family}.{key} = {_short(value)}; a positive {kind.__name__} is needed.")
        # GGUF keeps float32; the shortest decimal that gives the same float32 is the number that was meant (1e-05).
        return float(str(np.float32(value))) if kind is float else value

    num_layers = number("block_count")
    if num_layers > len(tensors):  # also bounds the list of tensors that are expected
        raise UserError(f"{name} declares {num_layers} layers but holds {len(tensors)} tensors; convert it again.")
    emb, heads = number("embedding_length"), number("attention.head_count")
    if f"{family}.attention.key_length" not in metadata and emb % heads:
        raise UserError(f"{name} has width {emb}, which does not divide into {heads} heads.")
    head_dim = number("attention.key_length", emb // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := number(key, head_dim)) != head_dim:
            raise UserError(f"{name} has {family}.{key} = {size}, unlike its head size {head_dim}: not supported.")
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise UserError(f"{name} lacks the embedding table 'token_embd.weight'; convert the model again.")
    vocab = table.shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens")
    for count in (number("vocab_size", vocab), len(tokens) if isinstance(tokens, list) else vocab):
        if count != vocab:
            raise UserError(f"{name} has {vocab} embedding rows for a vocabulary of {count}; convert the model again.")
    config = {
        **arch.computes,
        "vocab_size": vocab,
        "emb_dim": emb,
        "num_heads": heads,
        "num_kv_heads": number("attention.head_count_kv", heads),
        "num_layers": num_layers,
        "head_dim": head_dim,
        "mlp_dim": number("feed_forward_length"),
        "rope_theta": number("rope.freq_base", arch.theta, float),
        "rope_factor": number("rope.scaling.factor", 1.0, float) if linear else 1.0,
        "norm_eps": number("attention.layer_norm_rms_epsilon", None, float),
        "tied_embeddings": "output.weight" not in tensors,
        "max_length": number("context_length"),
    }
    if arch.windowed:
        config["window"] = number("attention.sliding_window")
        config["local_rope_theta"] = number("rope.freq_base_swa", 1e4, float)
        if number("attention.sliding_window_pattern", config["global_every"]) != config["global_every"]:
            raise UserError(f"{name} has another pattern of sliding windows than {family} models; convert it again.")
    if family == "gemma3" and num_layers == architectures.GEMMA3_27B_LAYERS:
        config["query_scale"] = (emb / heads) ** -0.5
    if ROPE_FACTORS in tensors:
        config |= _rope(file, config)
    DecoderConfig(**config)  # raises for sizes that do not fit together
    return config


def _rope(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """How Llama 3.1 and later scale rotary frequencies. A file holds the outcome alone, which has to be recognised."""
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape == (config["head_dim"] // 2,) and tensor.readable:
        factors = file.rows(ROPE_FACTORS, 0, tensor.shape[0])
        if np.all(factors == 1):
            return {}
        factor, theta, head_dim = float(np.max(factors)), config["rope_theta"], config["head_dim"]
        scaled = layers.rotary_frequencies(head_dim, theta, factor, *architectures.LLAMA3_ROPE.values())
        plain = layers.rotary_frequencies(head_dim, theta)
        if np.allclose(np.asarray(plain / scaled), factors, rtol=1e-3, atol=0):
            return {"rope_factor": factor, **architectures.LLAMA3_ROPE}
    raise UserError(
        f"{file.name} scales its rotary frequencies in another way than Llama 3.1 does: that is not computed."
    )


def _reader(file: File, config: DecoderConfig, arch: architectures.Architecture, leaf: str, tensor: str) -> Reader:
    """Rows of a tensor as we keep them."""
    rows = functools.partial(file.rows, tensor)
    if arch.interleaved and leaf.endswith(("query/kernel", "key/kernel")):
        return functools.partial(_halves, rows, config.head_dim)
    if leaf.endswith("/scale") and config.norm_offset:
        return lambda first, count: rows(first, count) - np.float32(config.norm_offset)
    return rows


def _halves(rows: Reader, head_dim: int, first: int, count: int) -> np.ndarray:
    """Rows of a query or key matrix that is stored interleaved.

    Llama GGUF files interleave the two halves of each head, for kernels that rotate neighbouring pairs; ours, like
    the released weights, rotate element j with element j + head_dim / 2. Stored row (head, j, half) is our row
    (head, half, j), so heads are read whole.
    """
    start = first - first % head_dim
    stop = -(-(first + count) // head_dim) * head_dim
    heads = rows(start, stop - start)
    apart = heads.reshape(-1, head_dim // 2, 2, heads.shape[-1]).swapaxes(1, 2).reshape(heads.shape)
    return apart[first - start : first - start + count]
