"""Zarr arrays as T5X writes them, read without trusting their metadata: all that can be is checked before any data.

T5X packs its chunks with gzip. Those are unpacked here, into no more memory than a chunk has: tensorstore would unfold
a small file into any size, and read zeros for a chunk that is missing. It unpacks the format that it writes where none
is chosen (blosc, which says how large it will be).
"""

import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promot_jax.convert.flax_msgpack import FLOATS, Index, is_shape
from promot_jax.errors import UserError

# Of floating point dtypes, by numpy's.
NAMES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "bfloat16"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_MAX_CHUNKS, _MAX_ZARRAY = 1 << 16, 1 << 16


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
            target[there] = self.chunk(at)[here]

    def file(self, at: Sequence[int]) -> Path:
        """The file of the chunk at a place of the grid."""
        return self.folder / (self.separator.join(map(str, at)) or "0")

    def chunk(self, at: Sequence[int]) -> np.ndarray:
        """One chunk, whole, as it is stored."""
        file, dtype = self.file(at), FLOATS[self.dtype]
        size = math.prod(self.chunks) * dtype.itemsize
        with open(file, "rb") as stream:
            data = stream.read(size + size // 64 + 4096)  # what does not shrink grows by no more than this
        if self.compressor in ("gzip", "zlib"):
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
            try:
                data = unpacker.decompress(data, size + 1)
            except zlib.error as error:
                raise UserError(f"The chunk {file} is damaged ({error}); fetch the checkpoint again.") from error
            if not unpacker.eof or unpacker.unused_data:
                data = b""
        elif self.compressor == "blosc" and int.from_bytes(data[4:8], "little") == size:
            return self.blosc(at)
        if len(data) != size:
            raise UserError(
                f"The chunk {file} does not unpack to the {size} bytes it needs; fetch the checkpoint again."
            )
        return np.frombuffer(data, dtype).reshape(self.chunks)

    def blosc(self, at: Sequence[int]) -> np.ndarray:
        """As `chunk`, through tensorstore: the part of the chunk that lies in the array."""
        import tensorstore as ts

        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(self.folder)}, "metadata": self.metadata}
        region = tuple(slice(i * n, min(i * n + n, s)) for i, n, s in zip(at, self.chunks, self.shape, strict=True))
        try:
            store = ts.open(spec, open=True, assume_metadata=True).result()
            return np.asarray(store[region].read().result())
        except ValueError as error:
            raise UserError(f"The chunk {self.file(at)} is damaged; fetch the checkpoint again.") from error


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
            if file.stat().st_size > _MAX_ZARRAY:
                raise fail("its .zarray is too large")
            metadata = json.loads(file.read_text("utf-8"))
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
    if name not in (None, "gzip", "zlib", "blosc") or (compressor is not None and name is None):
        raise fail("its compressor is none of gzip, zlib, blosc and null")
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
