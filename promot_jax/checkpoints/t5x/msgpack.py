"""Flax's msgpack, read without trusting a size that it declares: one value per file, arrays left where they lie.

The msgpack package makes lists of any declared length, and flax copies every array into memory, which doubles what an
old T5X checkpoint needs that holds the whole model in one file. Here each count is checked against the bytes that are
left, and an array is a place in the file until it is asked for. Nothing is ever executed.
"""

import dataclasses
import itertools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from promot_jax.errors import UserError

Index = tuple[slice, ...]

FLOATS: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Far beyond what a checkpoint of any size has; they bound the time and the memory that a damaged one may cost.
_MAX_ITEMS, _MAX_DEPTH, _MAX_TEXT, _MAX_DIMS = 1 << 20, 24, 4096, 8
_CHUNKED = "__msgpack_chunked_array__"


@dataclasses.dataclass(frozen=True)
class Inline:
    """An array inside a msgpack file: its bytes are `pieces` in order, each (start, size)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]

    def check(self, name: str) -> None:
        """Raises UserError unless it holds floating point numbers, as many as its shape says."""
        if self.dtype not in FLOATS:
            raise UserError(f"{name} holds {self.dtype[:40]!r}, not floating point numbers; give another checkpoint.")
        have, want = sum(size for _, size in self.pieces), math.prod(self.shape) * FLOATS[self.dtype].itemsize
        if have != want:
            raise UserError(f"{name} has {have} bytes and needs {want}; fetch the checkpoint again.")

    def fill(self, target: np.ndarray, index: Index) -> None:
        """Copies `self[index]` into `target`, which has its shape, cast to its dtype."""
        straight = target.shape == self.shape and target.dtype == FLOATS[self.dtype] and target.flags.c_contiguous
        values = target if straight else np.empty(self.shape, FLOATS[self.dtype])
        room = values.reshape(-1).view(np.uint8).data
        with open(self.file, "rb") as file:
            for start, size in self.pieces:
                file.seek(start)
                if file.readinto(room[:size]) != size:
                    raise UserError(f"{self.file} ended while it was read; fetch it again.")
                room = room[size:]
        if not straight:
            target[...] = values[index]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes in a msgpack file that are not looked at."""

    start: int
    size: int


class _Cursor:
    """Reads a msgpack file from the start, never more than it has."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left, self.items = os.fstat(file.fileno()).st_size, 0

    def fail(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a readable T5X checkpoint: {why}; fetch or write it again.")

    def need(self, count: int) -> int:
        if count > self.left:
            raise self.fail(f"it ends early ({count} more bytes wanted, {self.left} left)")
        return count

    def take(self, count: int) -> bytes:
        if len(data := self.file.read(self.need(count))) != count:
            raise self.fail("it ended while it was read")
        self.left -= count
        return data

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "big", signed=signed)

    def text(self, size: int) -> str:
        if size > _MAX_TEXT:
            raise self.fail(f"it holds a text of {size} bytes")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a text in it is not UTF-8") from error

    def skip(self, size: int) -> Bytes:
        start = self.file.tell()
        self.file.seek(self.need(size), os.SEEK_CUR)
        self.left -= size
        return Bytes(start, size)

    def value(self, depth: int = 0) -> Any:
        """The next value: None, bool, int, float, str, list, dict with str keys, `Inline` or `Bytes`."""
        self.items += 1
        if depth > _MAX_DEPTH or self.items > _MAX_ITEMS:
            raise self.fail(f"it nests deeper than {_MAX_DEPTH} levels or has more than {_MAX_ITEMS} entries")
        tag = self.take(1)[0]
        if tag < 0x80 or tag >= 0xE0:
            return tag if tag < 0x80 else tag - 0x100
        if tag < 0xA0:
            return self.map(tag & 15, depth) if tag < 0x90 else self.list(tag & 15, depth)
        if tag < 0xC0:
            return self.text(tag & 31)
        if 0xC4 <= tag <= 0xC6:
            return self.skip(self.number(1 << (tag - 0xC4)))
        if 0xC7 <= tag <= 0xC9:
            return self.extension(self.number(1 << (tag - 0xC7)), depth)
        if 0xCC <= tag <= 0xD3:
            return self.number(1 << (tag & 3), signed=tag >= 0xD0)
        if 0xD4 <= tag <= 0xD8:
            return self.extension(1 << (tag - 0xD4), depth)
        if 0xD9 <= tag <= 0xDB:
            return self.text(self.number(1 << (tag - 0xD9)))
        if 0xDC <= tag <= 0xDF:
            count = self.number(4 if tag & 1 else 2)
            return self.list(count, depth) if tag < 0xDE else self.map(count, depth)
        if tag in (0xCA, 0xCB):
            return struct.unpack(">f", self.take(4))[0] if tag == 0xCA else struct.unpack(">d", self.take(8))[0]
        if tag == 0xC1:
            raise self.fail("a byte in it begins no msgpack value")
        return None if tag == 0xC0 else tag == 0xC3

    def list(self, count: int, depth: int) -> list[Any]:
        self.need(count)
        return [self.value(depth + 1) for _ in range(count)]

    def map(self, count: int, depth: int) -> Any:
        """A dict, or the array that flax has cut into pieces of less than 2 GiB."""
        self.need(2 * count)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise self.fail(f"a key in it is no text, or is there twice: {str(key)[:40]!r}")
            found[key] = self.value(depth + 1)
        return self.joined(found) if _CHUNKED in found else found

    def extension(self, size: int, depth: int) -> Inline | Bytes:
        """One of flax's own types: 1 an array and 3 a scalar are read, 2 (complex) and others passed over."""
        kind = self.number(1)
        if kind not in (1, 3):
            return self.skip(size)
        after = self.left - self.need(size)
        self.left = size
        match self.value(depth + 1):
            case [list() as shape, str() as dtype, Bytes() as place] if self.left == 0 and is_shape(shape):
                self.left = after
                return Inline(self.path, tuple(shape), dtype, ((place.start, place.size),))
        raise self.fail("an array in it is damaged")

    def joined(self, found: Mapping[str, Any]) -> Inline:
        match found:
            case {"shape": dict() as sizes, "chunks": dict() as chunks}:
                shape: list[Any] = [sizes.get(str(i)) for i in range(len(sizes))]
                parts = [part for i in range(len(chunks)) if isinstance(part := chunks.get(str(i)), Inline)]
                if is_shape(shape) and len(parts) == len(chunks) and len({part.dtype for part in parts}) == 1:
                    pieces = itertools.chain.from_iterable(part.pieces for part in parts)
                    return Inline(self.path, tuple(shape), parts[0].dtype, tuple(pieces))
        raise self.fail("an array in pieces is damaged")


def is_shape(value: Any) -> bool:
    """Whether a value from an untrusted file is a list of sizes: few of them, none of them absurd."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(size) is int and 0 <= size < 1 << 40 for size in value)
    )


def read_msgpack(path: Path) -> Any:
    """Reads the one value in a file that flax serialised; arrays come as `Inline`, still in the file.

    Raises:
        UserError: the file is missing, damaged, or larger in structure than any checkpoint.
    """
    try:
        with open(path, "rb") as file:
            cursor = _Cursor(file, path)
            value = cursor.value()
            if cursor.left:
                raise cursor.fail(f"{cursor.left} bytes follow its end")
            return value
    except OSError as error:
        raise UserError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
