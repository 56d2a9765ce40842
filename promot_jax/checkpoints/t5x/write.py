"""Writes a native T5X checkpoint (format version 3)."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from promot_jax import files, trees
from promot_jax.checkpoints.t5x.msgpack import FLOATS
from promot_jax.checkpoints.t5x.names import per_layer, stacked
from promot_jax.errors import StorageError, UserError

_INLINE = 1 << 14  # values: norm scales and position biases stay below it, as what T5X does not partition
_CHUNK = 1 << 26  # bytes of a zarr chunk


def write(folder: str | os.PathLike[str], step: int, params: Mapping[str, Any], *, inline: int = _INLINE) -> Path:
    """Writes a checkpoint that T5X restores, and `Checkpoint` reads back bit for bit: `folder/checkpoint_<step>`.

    Args:
        folder: where checkpoints lie; made if needed.
        step: of training, as T5X will count on from it.
        params: our parameters, float32, bfloat16 or float16, layers stacked on axis 0.
        inline: leaves of fewer values go into the msgpack file.

    Returns:
        The checkpoint's folder, which appears only when it is complete.

    Raises:
        UserError: it is there already.
        StorageError: it cannot be written.
    """
    from flax import serialization

    final = Path(folder) / f"checkpoint_{int(step)}"
    if final.exists():
        raise UserError(f"{final} is there already; give another folder, or delete it.")
    try:
        with files.replacing(final) as scratch:
            scratch.mkdir()
            target = {
                name: array if array.size < inline else _write_zarr(scratch, f"target.{name.replace('/', '.')}", array)
                for path, leaf in trees.flatten(params).items()
                for name, array in _layers(path, leaf)
            }
            # As T5X writes a model without an optimizer (`InferenceState.state_dict`): no `param_states`, not even an
            # empty dict, which T5X would restore as a leaf.
            state = {"step": np.asarray(step, np.int32)}
            content = {"version": 3, "optimizer": {"target": trees.unflatten(target), "state": state}}
            (scratch / "checkpoint").write_bytes(serialization.msgpack_serialize(content, in_place=True))
    except OSError as error:
        raise StorageError(f"Cannot write {str(final)!r}: {error.strerror or error}.") from error
    return final


def _layers(path: str, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """T5X's names and arrays of a leaf of ours, one at a time."""
    for i, name in enumerate(per_layer(path, leaf.shape)):
        array = np.asarray(leaf[i] if stacked(path) else leaf, order="C")
        if array.dtype.name not in FLOATS:
            raise UserError(f"The parameter {path!r} is {array.dtype.name}; only floating point numbers are written.")
        yield name, array


def _write_zarr(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    """Writes one array as T5X does, and returns the spec that stands for it in the msgpack file."""
    import tensorstore as ts

    rows = min(array.shape[0], max(1, _CHUNK * array.shape[0] // array.nbytes))
    metadata = {
        "chunks": [rows, *array.shape[1:]],
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(array.shape),
    }
    spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    place = {"driver": "file", "path": str(folder / name)}
    # Without the second option a chunk of zeros is not written, and to read it could not be told from a lost one.
    options = {"create": True, "store_data_equal_to_fill_value": True}
    ts.open({**spec, "kvstore": place, **options}).result().write(array).result()
    return {**spec, "kvstore": {"driver": "file", "path": name}}
