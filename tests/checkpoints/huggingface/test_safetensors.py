"""The safetensors format: agreement with its own package, and one clear error for anything that is not it."""

import json
import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from promot_jax.checkpoints.huggingface import safetensors as ours
from promot_jax.errors import UserError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
    "b": torch.arange(6, dtype=torch.bfloat16) / 3,
    "c": torch.arange(8, dtype=torch.float16).reshape(2, 2, 2) / 3,
    "ids": torch.arange(3),
}


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    safetensors.torch.save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


def everything(path: Path) -> dict[str, np.ndarray]:
    """All that is read of a file, row by row."""
    with ours.opened(path) as file:
        return {
            name: np.stack([file.rows(name, i, 1)[0] for i in range(tensor.shape[0])])
            for name, tensor in file.tensors.items()
            if tensor.readable and tensor.shape and min(tensor.shape) > 0
        }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_rows_are_what_the_package_reads(path: Path) -> None:
    found = everything(path)
    assert found.keys() == {"a.weight", "b", "c"}
    for name, array in found.items():
        assert array.tobytes() == bits(TENSORS[name]) and array.shape == tuple(TENSORS[name].shape)
    assert found["b"].dtype == ml_dtypes.bfloat16
    with ours.opened(path) as file:
        assert np.array_equal(file.rows("a.weight", 1, 2), TENSORS["a.weight"][1:].numpy())
        with pytest.raises(UserError, match="stores 'ids' as I64; only F32, F16, BF16 are read"):
            file.rows("ids", 0, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_package_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T / 7, "y": np.ones(5, np.float32)}
    sources = {name: ours.Source(array.shape, lambda array=array: array) for name, array in values.items()}
    ours.write(tmp_path / "m.safetensors", sources, dtype)
    for name, tensor in safetensors.torch.load_file(tmp_path / "m.safetensors").items():
        assert tensor.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensor.float(), torch.tensor(values[name].copy()).to(tensor.dtype).float())
    assert len(list(ours.shards(sources, dtype, 20))) == 2


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read"), ours.opened(tmp_path / "none.safetensors"):
        pass


def write(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "invalid type: sequence"),
        (b'{"a": {}, "a": {}}', "missing field `dtype`"),
        (b"[" * 100_000, "invalid type: sequence"),
        (b'{"a":' * 10 + b"1" + b"}" * 10, "missing field `dtype`"),
        (b"\xff", "not a readable"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a readable"),
        ({"a": GOOD | {"dtype": "F7"}}, "unknown variant `F7`"),
        ({"a": GOOD | {"dtype": ["F32"]}}, "expected string"),
        ({"a": GOOD | {"shape": [-2]}}, "expected usize"),
        ({"a": GOOD | {"shape": [2.0]}}, "expected usize"),
        ({"a": GOOD | {"shape": [True]}}, "expected usize"),
        ({"a": GOOD | {"shape": [2**61, 2**61]}}, "overflow computing"),
        ({"a": GOOD | {"shape": [1] * 9}}, "invalid shape"),
        ({"a": GOOD | {"data_offsets": [8, 16]}}, "invalid offset for tensor `a`"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "invalid offset for tensor `a`"),
        ({"a": GOOD, "b": GOOD}, "invalid offset for tensor"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [8, 16]}}, "not fully covered"),
        ({"a": GOOD | {"shape": [1], "data_offsets": [0, 4]}}, "not fully covered"),
        ({"__metadata__": {"a": 1}}, "expected a string"),
        ({"n\n" * 600: GOOD | {"data_offsets": [8, 16]}}, "invalid offset for tensor"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(UserError, match=message) as caught, ours.opened(path):
        pass
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**26, 100])
def test_a_wild_header_length_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "m.safetensors", {"a": GOOD}, length=length)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"header too large|invalid header length"), ours.opened(path):
        pass
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def mutated(good: bytes, rng: random.Random) -> bytes:
    """A damaged copy: bits, bytes, numbers and words of the header, its length, a piece lost or doubled."""
    data = bytearray(good)
    length = struct.unpack("<Q", good[:8])[0]
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, len(data), rng.getrandbits(64)]))
    elif kind == 3:
        start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
        data[start:stop] = rng.choice([b"", data[start:stop] * 2, b"{", b"[[", b"-1", b"\0" * (stop - start)])
    elif kind == 4:
        del data[rng.randrange(len(data)) :]
    else:  # the header says something else, in good JSON
        header = json.loads(good[8 : 8 + length])
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        what = rng.choice(["dtype", "shape", "data_offsets"])
        numbers = [rng.choice([0, 1, -1, 2, 8, 12, 48, 2**31, 2**63, 1e9, None, "1"]) for _ in range(rng.randint(0, 3))]
        entry[what] = rng.choice(["F32", "F16", "BF16", "I32", "U8", 3]) if what == "dtype" else numbers
        text = json.dumps(header).encode()
        data[: 8 + length] = struct.pack("<Q", len(text)) + text
    return bytes(data)


def test_two_thousand_damaged_files(path: Path) -> None:
    """Refused in one sentence, or read as the format's own package reads them; never anything else, never slow."""
    good, rng, started = path.read_bytes(), random.Random(0), time.monotonic()
    refused = []
    for _ in range(2000):
        data = mutated(good, rng)
        path.write_bytes(data)
        try:
            found = everything(path)
        except UserError as error:
            refused.append(str(error))
            continue
        theirs = safetensors.torch.load(data)
        for name, array in found.items():
            assert array.tobytes() == bits(theirs[name]) and array.shape == tuple(theirs[name].shape)
    assert all(len(message) < 800 and "\n" not in message for message in refused)
    assert 1000 < len(refused) < 2000 and time.monotonic() - started < 60
