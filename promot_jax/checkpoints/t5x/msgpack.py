"""Flax's msgpack, read by the `msgpack` package: one tree per file, its arrays in memory.

`flax.serialization.msgpack_restore` sets no limits and raises whatever a damaged file leads to; the limits and the one
error are all that is added here.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from promot_jax.errors import UserError

Index = tuple[slice, ...]

FLOATS: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ARRAY, _SCALAR = 1, 3  # flax's extension types; 2, a complex number, is passed over
_MAX_LIST = 4096  # items; lists are allocated at the length that a file declares, and only shapes are lists
_CHUNKED = "__msgpack_chunked_array__"


def read_msgpack(path: Path) -> Any:
    """Reads the tree in a file that flax serialised: dicts with text keys, scalars, and numpy arrays.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        data = path.read_bytes()
        return msgpack.unpackb(
            data, ext_hook=_extension, object_pairs_hook=_dict, strict_map_key=False, max_array_len=_MAX_LIST
        )
    except OSError as error:
        raise UserError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    except ValueError as error:  # of msgpack, or of the functions below
        why = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is not a readable T5X checkpoint: {why}; fetch or write it again.") from error


def _extension(kind: int, data: bytes) -> Any:
    """An array, of which flax keeps shape, name of the dtype, and bytes."""
    if kind not in (_ARRAY, _SCALAR):
        return msgpack.ExtType(kind, data)
    try:
        shape, dtype, values = msgpack.unpackb(data, max_array_len=_MAX_LIST)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"an array in it is damaged ({error})") from error


def _dict(pairs: list[tuple[Any, Any]]) -> Any:
    """A dict, or the array that flax has cut into pieces of at most 1 GiB."""
    keys = [key for key, _ in pairs]
    if not all(isinstance(key, str) for key in keys) or len(tree := dict(pairs)) != len(keys):
        raise ValueError(f"a key in it is no text, or is there twice: {str(keys)[:80]}")
    if _CHUNKED not in tree:
        return tree
    try:
        chunks, shape = ([tree[name][str(i)] for i in range(len(tree[name]))] for name in ("chunks", "shape"))
        return np.concatenate(chunks).reshape(shape)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"an array in pieces is damaged ({error})") from error
