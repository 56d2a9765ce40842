"""T5X checkpoints of a tiny T5, written with msgpack and tensorstore and nothing of the code under test."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import tensorstore

EMBED, HEADS, SIZE, MLP, VOCAB = 8, 2, 3, 12, 20
GZIP = {"id": "gzip", "level": 1}
Arrays = dict[str, np.ndarray]


def t5_shapes(encoder: int = 2, decoder: int = 2) -> dict[str, tuple[int, ...]]:
    """Our tree of a T5 1.1."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedder/embedding": (VOCAB, EMBED)}
    shapes["decoder/logits_dense/kernel"] = (EMBED, VOCAB)
    kinds = {
        "encoder": (encoder, ("attention",)),
        "decoder": (decoder, ("self_attention", "encoder_decoder_attention")),
    }
    for side, (depth, attentions) in kinds.items():
        shapes[f"{side}/relpos_bias/rel_embedding"] = (HEADS, 4)
        shapes[f"{side}/{side}_norm/scale"] = (EMBED,)
        shapes[f"{side}/layers/pre_mlp_layer_norm/scale"] = (depth, EMBED)
        for kernel in ("wi_0", "wi_1"):
            shapes[f"{side}/layers/mlp/{kernel}/kernel"] = (depth, EMBED, MLP)
        shapes[f"{side}/layers/mlp/wo/kernel"] = (depth, MLP, EMBED)
        for attention in attentions:
            shapes[f"{side}/layers/pre_{attention}_layer_norm/scale"] = (depth, EMBED)
            for kernel in ("query", "key", "value"):
                shapes[f"{side}/layers/{attention}/{kernel}/kernel"] = (depth, EMBED, HEADS * SIZE)
            shapes[f"{side}/layers/{attention}/out/kernel"] = (depth, HEADS * SIZE, EMBED)
    return shapes


SHAPES = t5_shapes()
QUERY = "decoder/layers_1/self_attention/query/kernel"  # the leaf that tests damage
KERNELS = "kernel", "embedding"


def draw(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: Any = np.float32) -> Arrays:
    """Random arrays under T5X's names, and by ours with "layers" in the path: the same, stacked."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {}
    for path, shape in shapes.items():
        for i in range(shape[0] if "/layers/" in path else 1):
            one = shape[1:] if "/layers/" in path else shape
            arrays[path.replace("/layers/", f"/layers_{i}/")] = rng.standard_normal(one).astype(dtype)
    return arrays


def stacked(arrays: Arrays, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    """What has to be read."""
    return {
        path: np.stack([arrays[path.replace("/layers/", f"/layers_{i}/")] for i in range(shape[0])]).astype(np.float32)
        if "/layers/" in path
        else arrays[path].astype(np.float32)
        for path, shape in shapes.items()
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of small files keep a busy disk waiting."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def pack(value: Any) -> bytes:
    """Flax's msgpack, from its description: arrays are extension type 1, (shape, dtype's name, bytes); scalars 3."""

    def extension(item: Any) -> msgpack.ExtType:
        array = np.asarray(item)
        kind = 3 if isinstance(item, np.generic) else 1
        return msgpack.ExtType(kind, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))

    return msgpack.packb(value, default=extension, strict_types=True)


def zarr(folder: Path, name: str, array: np.ndarray, form: str = "file", **metadata: Any) -> dict[str, Any]:
    """Writes an array and returns the spec that T5X keeps of it."""
    metadata = {"chunks": [-(-n // 2) for n in array.shape], "compressor": GZIP, "shape": list(array.shape)} | metadata
    place = f"target.{name.replace('/', '.')}"
    spec: dict[str, Any] = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
    store = {"driver": "file", "path": str(folder / place)}
    tensorstore.open(spec | {"kvstore": store}, create=True).result().write(array).result()
    match form:
        case "gcs":
            return spec | {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": place + "/"}}
        case "old":
            return spec | {"kvstore": {"driver": "gfile"}, "path": place}
        case "placeholder":
            return f"PLACEHOLDER://{place}"  # type: ignore[return-value]
        case "bare":
            (folder / place / ".zarray").unlink()
        case "bounds":
            whole = {"input_exclusive_max": [[n] for n in array.shape], "input_inclusive_min": [0] * array.ndim}
            spec["transform"] = whole
    return spec | {"kvstore": {"driver": "file", "path": place}}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *subtrees, last = path.split("/")
        node = tree
        for subtree in subtrees:
            node = node.setdefault(subtree, {})
        node[last] = leaf
    return tree


def save(
    folder: Path, arrays: Arrays, form: str = "file", edit: Callable[[dict], Any] | None = None, **more: Any
) -> Path:
    """Writes a checkpoint; `edit` changes the flat target before it is packed."""
    folder.mkdir(parents=True)
    flat: dict[str, Any] = {
        name: zarr(folder, name, array, form, **more) if form != "inline" and name.endswith(KERNELS) else array
        for name, array in arrays.items()
    }
    if edit:
        edit(flat)
    state = {"step": np.int32(7), "param_states": {"decoder": {"v": np.ones(3, np.float32), "m": None}}}
    (folder / "checkpoint").write_bytes(pack({"version": 3, "optimizer": {"target": nested(flat), "state": state}}))
    return folder
