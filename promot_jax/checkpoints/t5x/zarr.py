"""Zarr arrays as T5X writes them, read by tensorstore where they lie: in a local folder or in a bucket.

Two things are looked at before tensorstore 0.1.86 reads, as measured: it waits for ever at a chunk that is a pipe, and
ends the process at chunks of 2**30 x 2**30 values (`std::bad_alloc`). It compares the checksum of a gzip chunk, unless
the chunk ends before it: of 6,000 chunks of 243 kB with one to three random damages none gave other values.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promot_jax.checkpoints.t5x.msgpack import FLOATS, Index
from promot_jax.errors import UserError

if TYPE_CHECKING:
    from tensorstore import TensorStore

_DTYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "bfloat16"}  # zarr's names by ours
_MAX_CHUNKS = 1 << 16
_BLOCK = 1 << 23  # values read at a time
_THREADS = min(8, os.cpu_count() or 1)


def inside(root: Path, path: str) -> Path:
    """Returns `root/path`, for a path that an untrusted file names.

    Raises:
        UserError: it climbs out of `root` (an absolute path, "..", a link to elsewhere).
    """
    parts = path.removesuffix("/").split("/")
    full = root.joinpath(*parts) if not {"", ".", ".."} & set(parts) and "\0" not in path else None
    try:
        climbs = full is None or not full.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links, or a name too long
        climbs = True
    if full is None or climbs:
        raise UserError(f"{root} names the path {path[:80]!r}, which is not one inside its folder; it is not read.")
    return full


def open_zarr(
    root: Path, path: str, spec: Mapping[str, Any], check: Callable[[tuple[int, ...]], None]
) -> "TensorStore":
    """Opens a zarr array; none of its chunks is read.

    Args:
        root: folder of the checkpoint.
        path: of the array below it, as the checkpoint names it.
        spec: what the checkpoint says of the array, as a TensorStore spec; may be empty. Its shape and dtype have to be
            those of the `.zarray`. Where that file is missing, the spec's metadata stand for it.
        check: called with the stored shape; raises where that is not the one wanted.

    Raises:
        UserError: the metadata are missing, damaged, out of bounds or not what the checkpoint says.
    """
    import tensorstore as ts

    folder = inside(root, path)
    dtype = {"dtype": spec["dtype"]} if "dtype" in spec else {}
    metadata = dict(spec.get("metadata", {}))
    try:
        if isinstance(folder, Path):  # nothing but files and folders, in a bucket
            _check_files(root, folder)
        bare = bool(metadata) and not (folder / ".zarray").exists()
        if not bare:  # T5X does not look at chunks and compressor of its own description
            metadata = {key: metadata[key] for key in ("shape", "dtype") if key in metadata}
        elif "dtype" not in metadata and str(spec.get("dtype")) in _DTYPES:
            metadata["dtype"] = _DTYPES[spec["dtype"]]
        array = {"driver": "zarr", "kvstore": _kvstore(folder), "metadata": metadata, **dtype}
        options = {"open": True, "assume_metadata": bare, "fill_missing_data_reads": False}
        store: Any = ts.open(array | options, read=True, context=_context()).result()
        # Newer versions spell out the bounds.
        described = store if spec.get("transform") is None else store[ts.IndexTransform(json=spec["transform"])]
    except (ValueError, OSError, TypeError) as error:  # TypeError: the spec is of something that JSON has not
        raise _refusal(folder, error) from error
    check(store.shape)
    if described.shape != store.shape or any(described.domain.origin):
        raise _refusal(folder, "the checkpoint describes a part of it")
    if store.dtype.name not in FLOATS:
        raise _refusal(folder, f"it holds {store.dtype.name}, not floating point numbers")
    chunks = store.chunk_layout.read_chunk.shape
    grid = [-(-size // n) for size, n in zip(store.shape, chunks, strict=True)]
    if any(n > size for n, size in zip(chunks, store.shape, strict=True)) or math.prod(grid) > _MAX_CHUNKS:
        raise _refusal(folder, f"its chunks {chunks} do not fit its shape {store.shape}")
    return described


@functools.cache
def _context() -> Any:
    """Few threads at a time: each keeps memory for itself that it has once used."""
    import tensorstore as ts

    limits = {"limit": _THREADS}
    return ts.Context({"file_io_concurrency": limits, "data_copy_concurrency": limits})


def _check_files(root: Path, folder: Path) -> None:
    """Raises UserError unless all in an array's folder are files and folders that lie inside the checkpoint's."""
    for file in folder.rglob("*"):
        if not inside(root, str(file.relative_to(root))).is_file() and not file.is_dir():
            raise UserError(f"{file} is not a file that can be read; fetch the checkpoint again.")


def fill(target: np.ndarray, store: "TensorStore", index: Index) -> None:
    """Copies `store[index]` into `target`, which has its shape, cast to its dtype; reads no other chunks.

    A block of rows at a time, whole chunks of them: tensorstore holds the packed data of all that it is asked for.

    Raises:
        UserError: a chunk is missing or damaged.
    """
    import tensorstore as ts

    layout: Any = store.chunk_layout
    start, stop, _ = index[0].indices(store.shape[0])
    rows = layout.read_chunk.shape[0]
    step = rows * max(1, _BLOCK // (rows * math.prod(store.shape[1:])))
    try:
        for first in range(start - start % rows, stop, step):
            here = slice(max(first, start), min(first + step, stop))
            part = ts.cast(store[(here, *index[1:])], ts.dtype(target.dtype.name))
            ts.array(target[here.start - start : here.stop - start]).write(part).result()
    except (ValueError, OSError) as error:
        raise _refusal(store.kvstore.path if store.kvstore else "", error) from error


def _kvstore(folder: Path) -> dict[str, str]:
    """Where tensorstore finds the files of an array."""
    if (bucket := re.fullmatch(r"gs://([^/]+)/(.*)", str(folder))) is not None:
        return {"driver": "gcs", "bucket": bucket[1], "path": f"{bucket[2]}/"}
    return {"driver": "file", "path": f"{folder}/"}


def _refusal(place: Path | str, why: object) -> UserError:
    """The one error for what tensorstore refuses; its reasons name file and chunk, and go on at length."""
    why = why.strerror if isinstance(why, OSError) else why
    reason = re.sub(
        r"^[A-Z_]+: |Error opening \"zarr\" driver: | \[(tensorstore_spec|source locations)=.*",
        "",
        str(why).replace("\n", " "),
    )
    return UserError(f"The zarr array {place} cannot be read: {reason[:300]}; fetch or write the checkpoint again.")
