"""GGUF files to our parameter tree: every tensor accounted for, one dequantised at a time.

Read are decoder-only models of architecture `llama` (Llama, SmolLM2 and others), `gemma3` (its text part), `qwen2`
(2 and 2.5) and `qwen3`; `gguf_tables` has what differs between them.

A GGUF file is a header (typed key/value metadata, then name, dimensions, quantisation and offset of each tensor)
followed by the tensor data. `gguf.GGUFReader` trusts every count in it and loops or allocates without bound on a
damaged file, so the header is read here, each count checked against the bytes that are left; the `gguf` package
supplies the quantisation formats. Tests hold the result against `GGUFReader` and against transformers.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from promot_jax.convert import gguf_tables
from promot_jax.convert.gguf_tables import ARCHITECTURES, Architecture
from promot_jax.errors import UserError
from promot_jax.models.decoder import DecoderConfig

Params = dict[str, Any]

# GGUF value type -> numpy dtype of a scalar; 8 is a string and 9 an array.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS, _MAX_NAME = 4, 128
_BLOCK_ELEMENTS = 1 << 22  # dequantised at a time, so that the quantisers' temporaries stay small

# Allowed in a file and not loaded: all ones, it changes nothing; with other values (Llama 3.1) reading stops.
UNUSED_TENSORS = ("rope_freqs.weight",)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: shape in numpy order (out, in), storage type, and the bytes `start` to `start + size`."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


class _Header:
    """Cursor over a file's header; takes no more bytes than the file has."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.left = os.fstat(file.fileno()).st_size

    def fail(self, why: str) -> UserError:
        return UserError(f"{self.name} is not a readable GGUF file: {why}; fetch or convert it again.")

    def take(self, count: int) -> bytes:
        if count > self.left or len(data := self.file.read(count)) != count:
            raise self.fail(f"it ends early ({count} bytes wanted, {self.left} left)")
        self.left -= count
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, least: int, what: str) -> int:
        """A number of items of at least `least` bytes each: no loop over it can outrun the file."""
        number = self.u64()
        if number * least > self.left:
            raise self.fail(f"it declares {number} {what}, more than it has bytes for")
        return number

    def string(self) -> str:
        try:
            return self.take(self.u64()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a text in it is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A scalar, a string, a list of strings or a numpy array of numbers."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()
        if kind != _ARRAY:
            raise self.fail(f"metadata of unknown type {kind}")
        item = self.u32()
        if item == _STRING:
            return [self.string() for _ in range(self.count(8, "strings"))]
        if item not in _SCALARS:
            raise self.fail(f"a metadata array of unknown type {item}")
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.take(self.count(dtype.itemsize, "numbers") * dtype.itemsize), dtype)

    def tensor(self) -> tuple[str, Tensor]:
        """Name and place; `start` still counts from the start of the data."""
        name, dims = self.string(), self.u32()
        if not 1 <= dims <= _MAX_DIMS or len(name) > _MAX_NAME:
            raise self.fail(f"tensor {name[:_MAX_NAME]!r} has {dims} dimensions and a name of {len(name)} characters")
        shape = tuple(self.u64() for _ in range(dims))[::-1]
        number, start = self.u32(), self.u64()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise self.fail(f"tensor {name!r} has the unknown storage type {number}") from error
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise self.fail(f"tensor {name!r} of shape {shape} cannot be stored as {kind.name}")
        return name, Tensor(shape, kind, start, math.prod(shape) // block * size)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"Cannot read {os.fspath(path)!r}: {error.strerror or error}.") from error


def _header(file: BinaryIO, file_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file; the tensors lie inside it and apart from one another."""
    header = _Header(file, file_name)
    if header.take(4) != b"GGUF":
        raise header.fail("it does not start with 'GGUF'")
    version = header.u32()
    if version not in (2, 3):
        raise header.fail(f"format version {version} or byte order (little-endian versions 2 and 3 are read)")
    tensor_count = header.count(24, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(header.count(13, "metadata entries")):
        key = header.string()
        if key in metadata:
            raise header.fail(f"metadata key {key[:_MAX_NAME]!r} is there twice")
        metadata[key] = header.value(header.u32())
    found: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name, tensor = header.tensor()
        if name in found:
            raise header.fail(f"tensor {name!r} is there twice")
        found[name] = tensor
    align = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise header.fail("its alignment is not a power of two")
    base = -(-header.file.tell() // align) * align
    end = header.file.tell() + header.left
    tensors = {name: dataclasses.replace(tensor, start=base + tensor.start) for name, tensor in found.items()}
    # Apart from one another: a small file must not unfold into many large arrays.
    free = base
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < free or tensor.start + tensor.size > end:
            raise header.fail(f"the data of tensor {name!r} overlaps other data or lies beyond the end of the file")
        free = tensor.start + tensor.size
    return metadata, tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a file's metadata: str, int, float, bool, list of str, or numpy array per key.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return _header(file, Path(path).name)[0]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the keyword arguments of the DecoderConfig that fits a file.

    Raises:
        UserError: the file is missing or damaged, of another architecture, or asks for what the decoder lacks.
    """
    with _opened(path) as file:
        return _config(*_header(file, Path(path).name), Path(path).name)


def read(path: str | os.PathLike[str]) -> tuple[DecoderConfig, Params, dict[str, Any]]:
    """Reads a model.

    Args:
        path: a GGUF file of one of `ARCHITECTURES`, in any quantisation that the `gguf` package can dequantise.

    Returns:
        The config; the parameters as float32 numpy arrays, layers stacked on axis 0 and kernels [in, out]; the
        file's metadata, from which `TokenizerVocabulary.from_gguf` makes the tokenizer.

    Raises:
        UserError: as `read_config`; or tensors are missing, unexpected, or of the wrong shape or values.
    """
    name = Path(path).name
    with _opened(path) as file:
        metadata, tensors = _header(file, name)
        config = DecoderConfig(**_config(metadata, tensors, name))
        arch = ARCHITECTURES[metadata["general.architecture"]]
        places = _places(config, arch)
        _check(name, tensors, places)
        for key in UNUSED_TENSORS:
            if key in tensors:
                factors = np.empty(tensors[key].shape, np.float32)
                _fill(file, name, key, tensors[key], factors)
                if not np.all(factors == 1):
                    raise UserError(f"{name} scales its rotary frequencies (as Llama 3.1 does); the decoder does not.")
        params: Params = {}
        for tensor, place in places.items():
            target = _leaf(params, place, config.num_layers)
            heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(place.leaf.split("/")[-2])
            order = _half_order(heads, config.head_dim) if arch.interleaved and heads else None
            _fill(file, name, tensor, tensors[tensor], target, order)
            if place.leaf.endswith("/scale"):
                target -= config.norm_offset
    return config, params, metadata


def _short(value: Any) -> str:
    return "a list" if np.ndim(value) else repr(value)[:80]


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    said = metadata.get("general.architecture")
    if not isinstance(said, str) or said not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{name} holds a model of architecture {_short(said)}; {known} are read from GGUF.")
    arch = ARCHITECTURES[said]
    if str(metadata.get("split.count", 1)) not in ("0", "1"):
        raise UserError(f"{name} is one part of several; merge the parts into one GGUF file first.")
    linear = str(metadata.get(f"{said}.rope.scaling.type")) == "linear"
    known_keys = gguf_tables.KNOWN_KEYS | (gguf_tables.WINDOW_KEYS if arch.windowed else set())
    known_keys |= {"rope.scaling.type", "rope.scaling.factor"} if linear else set()
    for key, value in metadata.items():
        short = key.removeprefix(f"{said}.")
        neutral = (0, 1) if short in gguf_tables.SCALES else (0, "none")
        if key != short and short not in known_keys and not (np.ndim(value) == 0 and value in neutral):
            raise UserError(f"{name} sets {key[:_MAX_NAME]} = {_short(value)}, which the decoder does not compute.")

    def number(key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
        value: Any = metadata.get(f"{said}.{key}", default)
        if value is None:
            raise UserError(f"{name} lacks the metadata '{said}.{key}'; convert the model again.")
        if isinstance(value, bool) or not isinstance(value, kind) or not (0 < value < 2**40):
            raise UserError(f"{name} has {said}.{key} = {_short(value)}; a positive {kind.__name__} is needed.")
        # GGUF keeps float32; the shortest decimal that gives the same float32 is the number that was meant (1e-05).
        return float(str(np.float32(value))) if kind is float else value

    num_layers = number("block_count")
    if num_layers > len(tensors):  # also bounds the list of tensors that are expected
        raise UserError(f"{name} declares {num_layers} layers but holds {len(tensors)} tensors; convert it again.")
    emb, heads = number("embedding_length"), number("attention.head_count")
    if f"{said}.attention.key_length" not in metadata and emb % heads:
        raise UserError(f"{name} has width {emb}, which does not divide into {heads} heads.")
    head_dim = number("attention.key_length", emb // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise UserError(f"{name} has {said}.{key} = {number(key)}, unlike its head size {head_dim}: not supported.")
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
            raise UserError(f"{name} has another pattern of sliding windows than {said} models; convert it again.")
    if said == "gemma3" and num_layers == gguf_tables.GEMMA3_27B_LAYERS:
        config["query_scale"] = (emb / heads) ** -0.5
    DecoderConfig(**config)  # raises for sizes that do not fit together
    return config


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor goes: leaf of our tree, layer (or None), shape as stored, whether we keep it transposed."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool = False


def _places(config: DecoderConfig, arch: Architecture) -> dict[str, _Place]:
    """Every tensor that a file with this config must hold, by name."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"emb": config.emb_dim, "q": q, "kv": kv, "mlp": config.mlp_dim, "head": config.head_dim}
    table = (config.vocab_size, config.emb_dim)
    places = {
        "token_embd.weight": _Place("token_embedder/embedding", None, table),
        "output_norm.weight": _Place("decoder/decoder_norm/scale", None, (config.emb_dim,)),
    }
    if not config.tied_embeddings:
        places["output.weight"] = _Place("decoder/logits_dense/kernel", None, table, transposed=True)
    for layer in range(config.num_layers):
        for short, (leaf, dims) in arch.tensors.items():
            shape = tuple(sizes[dim] for dim in dims)
            places[f"blk.{layer}.{short}"] = _Place(f"decoder/layers/{leaf}", layer, shape, len(dims) == 2)
    return places


def _check(name: str, tensors: Mapping[str, Tensor], places: Mapping[str, _Place]) -> None:
    """Raises one UserError that lists what is missing, unexpected, misshapen or stored in an unknown way."""
    shapes = {key: (tensors[key].shape, place.shape) for key, place in places.items() if key in tensors}
    problems = {
        "missing": [key for key in places if key not in tensors],
        "unexpected": [key for key in tensors if key not in places and key not in UNUSED_TENSORS],
        "wrong shape": [f"{key} {found} instead of {want}" for key, (found, want) in shapes.items() if found != want],
        "unknown storage": sorted({t.kind.name for t in tensors.values() if not _readable(t.kind)}),
    }
    listed = [
        f"{what}: {', '.join(items[:4])}{f' and {len(items) - 4} more' if len(items) > 4 else ''}"
        for what, items in problems.items()
        if items
    ]
    if listed:
        raise UserError(f"{name} does not hold the tensors of the model it describes; {'; '.join(listed)}.")


def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        _dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantize(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """uint8 [rows, bytes of a row] -> float32 [rows, values of a row]."""
    with np.errstate(all="ignore"):  # damaged scales overflow; `_fill` looks at the result
        return gguf.quants.dequantize(rows, kind)


def _half_order(heads: int, head_dim: int) -> np.ndarray:
    """Row of ours for each row of a query or key matrix that is stored interleaved.

    Llama GGUF files interleave the two halves of each head, for kernels that rotate neighbouring pairs; ours, like
    the released weights, rotate element j with element j + head_dim / 2. Stored row (head, j, half) is our row
    (head, half, j).
    """
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def _leaf(params: Params, place: _Place, num_layers: int) -> np.ndarray:
    """The slot of a tensor, as a view in the order of the file; its array is allocated when first asked for."""
    *rooms, last = place.leaf.split("/")
    for room in rooms:
        params = params.setdefault(room, {})
    if last not in params:
        shape = place.shape[::-1] if place.transposed else place.shape
        params[last] = np.empty(shape if place.layer is None else (num_layers, *shape), np.float32)
    slot = params[last] if place.layer is None else params[last][place.layer]
    return slot.T if place.transposed else slot


def _fill(
    file: BinaryIO, name: str, key: str, tensor: Tensor, target: np.ndarray, order: np.ndarray | None = None
) -> None:
    """Dequantises one tensor into `target`, a block of rows at a time; row i goes to row order[i] when given."""
    columns = tensor.shape[-1]
    target = target if target.ndim == 2 else target.reshape(-1, columns)
    row_bytes = tensor.size // len(target)
    step = max(1, _BLOCK_ELEMENTS // columns)
    file.seek(tensor.start)
    for first in range(0, len(target), step):
        count = min(step, len(target) - first)
        data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise UserError(f"{name} ended while {key} was read; fetch it again.")
        values = _dequantize(np.frombuffer(data, np.uint8).reshape(count, row_bytes), tensor.kind)
        if not np.isfinite(values).all():
            raise UserError(f"{name} holds values in {key} that are not finite numbers; fetch it again.")
        target[slice(first, first + count) if order is None else order[first : first + count]] = values
