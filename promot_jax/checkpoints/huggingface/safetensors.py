"""The safetensors format: tensors and rows by the `safetensors` package, and a writer that streams.

The package checks header and offsets before it hands out a tensor, and maps the file into memory (its `pread` backend
reads a whole tensor for each slice: 16.8 GB for one of 262 MB in 64 parts). Its own writer takes all tensors of a file
at once, ours one at a time.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from promot_jax.checkpoints.placement import Stored
from promot_jax.errors import UserError

_SHOWN = 80  # characters of a name in a message
_READABLE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # that `write` takes, by our name


@dataclasses.dataclass(frozen=True)
class File:
    """An open file: its tensors by name."""

    name: str
    handle: safe_open
    tensors: dict[str, Stored]

    def rows(self, tensor: str, first: int, count: int) -> np.ndarray:
        """Reads rows `first` to `first + count` of a tensor as stored: `[count, ...]`, in the file's dtype.

        Raises:
            UserError: the tensor holds no floats.
        """
        if not self.tensors[tensor].readable:
            kind = self.tensors[tensor].kind
            raise UserError(f"{self.name} stores {tensor[:_SHOWN]!r} as {kind}; only {', '.join(_READABLE)} are read.")
        return self.handle.get_slice(tensor)[first : first + count]


def parse_json(data: bytes, origin: str, what: str) -> Any:
    """Parses JSON from outside: `data` in UTF-8, of the file `origin`, which should be `what`.

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
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(safe_open(path, "numpy"))
            parts = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118, it is no dict
        except OSError as error:
            raise UserError(f"Cannot read {os.fspath(path)!r}: {error.strerror or error}.") from error
        except SafetensorError as error:
            why = " ".join(str(error).removeprefix("Error while deserializing header: ").split())[:200]
            raise UserError(f"{name} is not a readable safetensors file: {why}; fetch it again.") from error
        tensors = {
            key: Stored(tuple(part.get_shape()), part.get_dtype(), part.get_dtype() in _READABLE)
            for key, part in parts.items()
        }
        yield File(name, handle, tensors)


class Source(NamedTuple):
    """A tensor to write: its shape, and how to get its values when their turn comes."""

    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def size_of(dtype: str) -> int:
    """Bytes of one value in a file that `write` made with this dtype."""
    return _READABLE[DTYPES[dtype]].itemsize


def write(path: Path, sources: Mapping[str, Source], dtype: str = "float32") -> None:
    """Writes a file, one tensor in memory at a time, in the order of `sources`, all as `dtype` (of `DTYPES`)."""
    kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, source in sources.items():
        start, end = end, end + math.prod(source.shape) * size_of(dtype)
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
    bytes_of_group = 0
    for name, source in sources.items():
        size = math.prod(source.shape) * size_of(dtype)
        if group and bytes_of_group + size > limit:
            yield group
            group, bytes_of_group = {}, 0
        group[name] = source
        bytes_of_group += size
    yield group
