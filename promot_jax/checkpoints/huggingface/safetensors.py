"""The safetensors format: a bounded reader of headers and rows, and a writer that streams.

A file is eight bytes of header length, a JSON header `{name: {"dtype", "shape", "data_offsets"}}`, and the data. Every
number in the header is checked against the file before anything is read or allocated by it. Data is read by ordinary
reads and not by a memory map, whose pages would count as the process's memory.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from promot_jax.checkpoints.placement import open_file
from promot_jax.errors import UserError

_MAX_HEADER = 1 << 25  # bytes; a model of 10,000 tensors has a header of 1 MB
_MAX_NAME, _MAX_DIMS = 512, 8
_SHOWN = 80  # characters of a name in a message
# Bytes per value; those in `_READABLE` can hold parameters.
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
_READABLE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # that `write` takes, by our name


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: storage type by the format's name, shape, and the bytes `start` to `start + size`."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def readable(self) -> bool:
        """Whether it holds floats that parameters are made of."""
        return self.kind in _READABLE


@dataclasses.dataclass(frozen=True)
class File:
    """An open file: its tensors by name."""

    name: str
    handle: io.FileIO
    tensors: dict[str, Tensor]

    def rows(self, tensor: str, first: int, count: int) -> np.ndarray:
        """Reads rows `first` to `first + count` of a tensor as stored: `[count, ...]`, in the file's dtype.

        Raises:
            UserError: the tensor holds no floats, or the file has become shorter.
        """
        found = self.tensors[tensor]
        if not found.readable:
            raise UserError(
                f"{self.name} stores {tensor[:_SHOWN]!r} as {found.kind}; only {', '.join(_READABLE)} are read."
            )
        block = np.empty((count, *found.shape[1:]), _READABLE[found.kind])
        self.handle.seek(found.start + first * (found.size // found.shape[0]))
        if self.handle.readinto(block.reshape(-1).view(np.uint8).data) != block.nbytes:
            raise UserError(f"{self.name} ended while {tensor[:_SHOWN]!r} was read; fetch it again.")
        return block


def parse_json(data: bytes, origin: str, what: str) -> Any:
    """Parses JSON from outside.

    Args:
        data: UTF-8.
        origin: file, for the message.
        what: it should be, for the message.

    Raises:
        UserError: not JSON, nested beyond measure, or a name is there twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice[:_SHOWN]!r} is there twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise UserError(f"{origin} is not {what}: it is nested too deeply; fetch it again.") from error
    except ValueError as error:
        raise UserError(f"{origin} is not {what}: {str(error)[:200]}; fetch it again.") from error


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[File]:
    """Opens a file and reads its header.

    Raises:
        UserError: the file is missing or damaged.
    """
    name = Path(path).name
    with open_file(path) as file:
        yield File(name, file, _header(file, name))


def _header(file: io.FileIO, name: str) -> dict[str, Tensor]:
    """The tensors of a file; they lie inside it, side by side and without gaps, as the format asks."""

    def fail(why: str) -> UserError:
        return UserError(f"{name} is not a readable safetensors file: {why}; fetch it again.")

    total = os.fstat(file.fileno()).st_size
    if total < 8:
        raise fail(f"it has {total} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(total - 8, _MAX_HEADER):
        raise fail(f"it declares a header of {length} bytes and has {total - 8}, of which {_MAX_HEADER} may be header")
    text = file.read(length)
    if len(text) != length:
        raise fail("it ends early")
    header = parse_json(text, name, "a readable safetensors file")
    if not isinstance(header, dict):
        raise fail("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("its __metadata__ is not an object of texts")
    tensors = {}
    for key, entry in header.items():
        try:
            tensors[key] = _tensor(key, entry, 8 + length)
        except ValueError as error:
            raise fail(f"tensor {key[:_SHOWN]!r} {error}") from error
    end = 8 + length
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise fail(f"the data of tensor {key[:_SHOWN]!r} does not begin where the data before it ends")
        end += tensor.size
    if end != total:
        raise fail(f"its tensors end at byte {end}, the file at {total}")
    return tensors


def _tensor(name: str, entry: Any, base: int) -> Tensor:
    """One entry of a header; a ValueError says what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("has no dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _SIZES:
        raise ValueError(f"has the unknown dtype {str(kind)[:_SHOWN]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("has a shape or offsets that are not lists of whole numbers")
    if len(shape) > _MAX_DIMS or len(name) > _MAX_NAME or len(offsets) != 2:
        raise ValueError(f"has {len(shape)} dimensions, {len(offsets)} offsets and a name of {len(name)} characters")
    size = math.prod(shape) * _SIZES[kind]
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"of shape {tuple(shape)} and dtype {kind} has {offsets[1] - offsets[0]} bytes, not {size}")
    return Tensor(kind, tuple(shape), base + offsets[0], size)


class Source(NamedTuple):
    """A tensor to write: its shape, and how to get its values when their turn comes."""

    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def size_of(dtype: str) -> int:
    """Bytes of one value in a file that `write` made with this dtype."""
    return _SIZES[DTYPES[dtype]]


def write(path: Path, sources: Mapping[str, Source], dtype: str = "float32") -> None:
    """Writes a file, one tensor in memory at a time.

    Args:
        path: of the new file.
        sources: tensors by name, in the order of the file.
        dtype: "float32" or "bfloat16", of all tensors.
    """
    kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, source in sources.items():
        start, end = end, end + math.prod(source.shape) * _SIZES[kind]
        header[name] = {"dtype": kind, "shape": list(source.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data is aligned to eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, source in sources.items():
            values = np.ascontiguousarray(source.values(), _READABLE[kind])
            if values.shape != source.shape:
                raise ValueError(f"{name} has shape {values.shape}, not {source.shape}")
            file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def shards(sources: Mapping[str, Source], dtype: str, limit: int) -> Iterable[dict[str, Source]]:
    """Splits tensors, in order, into files of at most `limit` bytes of data (a larger tensor gets one of its own)."""
    group: dict[str, Source] = {}
    held = 0
    for name, source in sources.items():
        size = math.prod(source.shape) * size_of(dtype)
        if group and held + size > limit:
            yield group
            group, held = {}, 0
        group[name] = source
        held += size
    yield group
