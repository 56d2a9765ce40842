"""The GGUF format: a bounded reader of headers and rows.

A file is a header (typed key/value metadata, then name, dimensions, quantisation and offset of each tensor) followed by
the tensor data. The `gguf` package supplies the quantisation formats. Its `GGUFReader` (0.19) is not used: it takes
9.4 s and 680 MB for the header of a Gemma 3 vocabulary (262,144 tokens; here 0.1 s and 20 MB), and over a damaged count
in a file of 150 bytes it loops until the memory is gone (beyond 4 GB). Tests hold the result against it.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np

from promot_jax.checkpoints.placement import open_file
from promot_jax.errors import UserError

# GGUF value type -> numpy dtype of a scalar; 8 is a string and 9 an array.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS, _MAX_NAME = 4, 128


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: shape in numpy order (out, in), storage type, and the bytes `start` to `start + size`."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int

    @property
    def readable(self) -> bool:
        """Whether its storage can be dequantised."""
        return _readable(self.kind)


@dataclasses.dataclass(frozen=True)
class File:
    """An open file: metadata (str, int, float, bool, list of str, or numpy array per key), and its tensors by name."""

    name: str
    handle: IO[bytes]
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def rows(self, key: str, first: int, count: int) -> np.ndarray:
        """Dequantises rows `first` to `first + count` of a tensor as stored: float32 `[count, ...]`.

        Raises:
            UserError: the file has become shorter.
        """
        found = self.tensors[key]
        if len(found.shape) == 1:  # a quantised block may span its numbers
            return self._blocks(key, found.start, 1, found.size).reshape(-1)[first : first + count]
        row = found.size // found.shape[0]
        return self._blocks(key, found.start + first * row, count, row).reshape(count, *found.shape[1:])

    def _blocks(self, key: str, start: int, count: int, row: int) -> np.ndarray:
        self.handle.seek(start)
        data = self.handle.read(count * row)
        if len(data) != count * row:
            raise UserError(f"{self.name} ended while {key} was read; fetch it again.")
        return _dequantize(np.frombuffer(data, np.uint8).reshape(count, row), self.tensors[key].kind)


class _Header:
    """Cursor over a file's header; takes no more bytes than the file has."""

    def __init__(self, file: IO[bytes], name: str) -> None:
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
def opened(path: str | os.PathLike[str]) -> Iterator[File]:
    """Opens a file and reads its header.

    Raises:
        UserError: the file is missing or damaged.
    """
    name = Path(path).name
    with open_file(path) as raw, io.BufferedReader(raw) as file:
        yield File(name, file, *_header(file, name))


def _header(file: IO[bytes], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file; the tensors lie inside it and apart from one another."""
    header = _Header(file, name)
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
        key, tensor = header.tensor()
        if key in found:
            raise header.fail(f"tensor {key!r} is there twice")
        found[key] = tensor
    align = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise header.fail("its alignment is not a power of two")
    base = -(-header.file.tell() // align) * align
    end = header.file.tell() + header.left
    tensors = {key: dataclasses.replace(tensor, start=base + tensor.start) for key, tensor in found.items()}
    # Apart from one another: a small file must not unfold into many large arrays.
    free = base
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < free or tensor.start + tensor.size > end:
            raise header.fail(f"the data of tensor {key!r} overlaps other data or lies beyond the end of the file")
        free = tensor.start + tensor.size
    return metadata, tensors


@functools.cache
def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        _dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantize(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """uint8 [rows, bytes of a row] -> float32 [rows, values of a row]."""
    with np.errstate(all="ignore"):  # damaged scales overflow; `placement.read` looks at the result
        return gguf.quants.dequantize(rows, kind)
