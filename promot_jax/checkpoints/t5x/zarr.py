"""Zarr arrays as T5X writes them, read without trusting their metadata: all that can be is checked before any data.

T5X packs its chunks with gzip. Those are unpacked here, into no more memory than a chunk has: tensorstore would unfold
a small file into any size, and read zeros for a chunk that is missing. It unpacks blosc (which it writes where nothing
is chosen) and zstd (Orbax's choice): both say at their start how large they will be.
"""

import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from promot_jax.checkpoints.remote_files import opened, read_bytes
from promot_jax.checkpoints.t5x.msgpack import FLOATS, Index, is_shape
from promot_jax.errors import UserError

# Of floating point dtypes, by numpy's.
NAMES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "bfloat16"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_MAX_CHUNKS, _MAX_ZARRAY = 1 << 16, 1 << 16
_PIECE = 1 << 20  # bytes unpacked at a time
_ZSTD = b"\x28\xb5\x2f\xfd"


def inside(root: Path, path: str) -> Path:
    """Returns `root/path`, for a path that an untrusted file names.

    Raises:
        UserError: it climbs out of `root` (an absolute path, "..", a link to elsewhere).
    """
    parts = path.removesuffix("/").split("/")
    found = root.joinpath(*parts) if not {"", ".", ".."} & set(parts) and "\0" not in path else None
    try:
        climbs = found is None or not found.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links, or a name too long
        climbs = True
    if found is None or climbs:
        raise UserError(f"{root} names the path {path[:80]!r}, which is not one inside its folder; it is not read.")
    return found


@dataclasses.dataclass(frozen=True)
class Zarr:
    """A zarr array on disk, all of whose chunks are there. `metadata` is that of its `.zarray`."""

    folder: Path
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    compressor: str | None
    separator: str
    metadata: Mapping[str, Any]

    def fill(self, target: np.ndarray, index: Index) -> None:
        """Copies `self[index]` into `target`, which has its shape, cast to its dtype; reads no other chunks."""
        box = [piece.indices(size)[:2] for piece, size in zip(index, self.shape, strict=True)]
        grid = [range(a // n, -(-b // n)) for (a, b), n in zip(box, self.chunks, strict=True)]
        for at in itertools.product(*grid):
            spans = [
                (max(a, i * n), min(b, i * n + n), i * n, a) for (a, b), i, n in zip(box, at, self.chunks, strict=True)
            ]
            here = tuple(slice(low - first, high - first) for low, high, first, _ in spans)
            there = tuple(slice(low - start, high - start) for low, high, _, start in spans)
            part = target[there]
            if part.shape == self.chunks and part.dtype == FLOATS[self.dtype] and part.flags.c_contiguous:
                self.chunk(at, part)  # straight to its place
            else:
                part[...] = self.chunk(at)[here]

    def file(self, at: Sequence[int]) -> Path:
        """The file of the chunk at a place of the grid."""
        return self.folder / (self.separator.join(map(str, at)) or "0")

    def chunk(self, at: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """One chunk, whole, as it is stored; into `out` where it is given, which has its shape and dtype."""
        file, out = self.file(at), np.empty(self.chunks, FLOATS[self.dtype]) if out is None else out
        if self.compressor in ("blosc", "zstd"):
            # What does not shrink grows by no more than this.
            data = read_bytes(file, out.nbytes + out.nbytes // 64 + 4096)
            filled = _declares(self.compressor, data) == out.nbytes
            if filled:
                out[...] = self._unpacked(file, data)
        else:
            with opened(file) as stream:
                filled = (_gunzip if self.compressor else _read)(stream, out.reshape(-1).view(np.uint8).data, file)
        if not filled:
            raise UserError(
                f"The chunk {file} does not unpack to the {out.nbytes} bytes it needs; fetch the checkpoint again."
            )
        return out

    def _unpacked(self, file: Path, data: bytes) -> np.ndarray:
        """A chunk that tensorstore unpacks, as the only one of an array in memory."""
        import tensorstore as ts

        store = ts.KvStore.open({"driver": "memory", "path": "chunk/"}, context=(context := ts.Context())).result()
        store.write(self.separator.join("0" * max(1, len(self.chunks))), data).result()
        spec = {"driver": "zarr", "kvstore": {"driver": "memory", "path": "chunk/"}}
        metadata = {**self.metadata, "shape": list(self.chunks), "chunks": list(self.chunks)}
        try:
            whole = ts.open({**spec, "metadata": metadata}, open=True, assume_metadata=True, context=context).result()
            return np.asarray(whole.read().result())
        except ValueError as error:
            raise UserError(f"The chunk {file} is damaged; fetch the checkpoint again.") from error


def _read(stream: BinaryIO, room: memoryview, _: Path) -> bool:
    """Fills the room from a file that is not packed; whether it has just that many bytes."""
    data = stream.read(len(room) + 1)
    if len(data) != len(room):
        return False
    room[:] = data
    return True


def _gunzip(stream: BinaryIO, room: memoryview, file: Path) -> bool:
    """Unpacks a file into the room, a piece at a time; whether it holds just that many bytes."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    filled, step = 0, min(_PIECE, len(room) + 4096)
    try:
        while not unpacker.eof and (piece := unpacker.unconsumed_tail or stream.read(step)):
            # A byte more than fits, so that one too many shows; and never 0, which means no limit.
            data = unpacker.decompress(piece, min(step, len(room) - filled + 1))
            if filled + len(data) > len(room):
                return False
            room[filled : filled + len(data)] = data
            filled += len(data)
    except zlib.error as error:
        raise UserError(f"The chunk {file} is damaged ({error}); fetch the checkpoint again.") from error
    return filled == len(room) and unpacker.eof and not unpacker.unused_data and not stream.read(1)


def _declares(compressor: str, data: bytes) -> int | None:
    """The size that packed data say they will have; None where they do not, or where they would take much more."""
    if compressor == "blosc":
        return int.from_bytes(data[4:8], "little")
    if len(data) < 6 or data[:4] != _ZSTD:
        return None
    # RFC 8878: one byte of flags, of the window if there is one, of a dictionary, and of the content's size.
    flags, at = data[4], 5
    single = bool(flags & 0x20)
    at += (not single) + (0, 1, 2, 4)[flags & 3]
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    size = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    at += width
    # Then blocks of at most 128 KiB each. Ordinary ones are full but for the last; a bomb is made of many.
    blocks, last = 0, False
    while width and not last and at + 3 <= len(data):
        head = int.from_bytes(data[at : at + 3], "little")
        last, blocks = bool(head & 1), blocks + 1
        at += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)
    return size if last and blocks <= size // 2048 + 8 else None


def open_zarr(root: Path, path: str, given: Mapping[str, Any] | None, check: Callable[[tuple[int, ...]], None]) -> Zarr:
    """Finds a zarr array and checks all that can be checked before it is read.

    Args:
        root: folder of the checkpoint.
        path: of the array below it, as the checkpoint names it.
        given: metadata to go by where the array's folder has no `.zarray`.
        check: called with the stored shape; raises where that is not the one wanted.

    Raises:
        UserError: its metadata or a chunk is missing, damaged or out of bounds.
    """
    folder = inside(root, path)

    def fail(why: str) -> UserError:
        return UserError(f"The zarr array {folder} cannot be read: {why}; fetch or write the checkpoint again.")

    file = inside(root, f"{path.removesuffix('/')}/.zarray")
    metadata: Any = given
    try:
        if file.is_file():
            text = read_bytes(file, _MAX_ZARRAY + 1)
            if len(text) > _MAX_ZARRAY:
                raise fail("its .zarray is too large")
            metadata = json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fail("its .zarray is damaged") from error
    if metadata is None:
        raise fail("it has no .zarray")
    match metadata:
        case {"shape": shape, "chunks": chunks, "dtype": str() as kind, "compressor": None | dict() as compressor}:
            pass
        case _:
            raise fail("its metadata lacks shape, chunks, dtype or compressor")
    if not is_shape(shape):
        raise fail("its shape is not one")
    check(tuple(shape))
    inside_shape = is_shape(chunks) and len(chunks) == len(shape)
    if not inside_shape or not all(0 < n <= size for n, size in zip(chunks, shape, strict=True)):
        raise fail("its chunks do not fit its shape")
    if kind not in _DTYPES:
        raise fail(f"its dtype is {kind[:40]!r}, not floating point numbers")
    name = compressor and compressor.get("id")
    if name not in (None, "gzip", "zlib", "blosc", "zstd") or (compressor is not None and name is None):
        raise fail("its compressor is none of gzip, zlib, blosc, zstd and null")
    separator = metadata.get("dimension_separator", ".")
    plain = metadata.get("zarr_format", 2) == 2 and metadata.get("order", "C") == "C" and not metadata.get("filters")
    if not plain or separator not in (".", "/"):
        raise fail("its zarr format, order, filters or separator are none that T5X writes")
    found = Zarr(folder, tuple(shape), _DTYPES[kind], tuple(chunks), name, separator, metadata)
    grid = [range(-(-size // n)) for size, n in zip(shape, chunks, strict=True)]
    if math.prod(map(len, grid)) > _MAX_CHUNKS:
        raise fail(f"it has more than {_MAX_CHUNKS} chunks")
    for at in itertools.product(*grid):
        piece = found.file(at)
        if not inside(root, str(piece.relative_to(root))).is_file():
            raise fail(f"its chunk {piece.name} is missing")
    return found
