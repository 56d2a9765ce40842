"""Streaming to sharded places: the right values everywhere, only the rows that are needed, and little memory."""

import compilation
import numpy as np
import pytest
from processes import python

from promot_jax import trees
from promot_jax.checkpoints import placement as places
from promot_jax.checkpoints.placement import Entry
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError

EMBEDDING = "token_embedder/embedding"


def reader(array, calls=None):
    def read(first, count):
        if calls is not None:
            calls.append((first, count))
        return array[first : first + count]

    return read


def test_layers_are_stacked_and_kernels_turned():
    stored = [np.random.default_rng(i).standard_normal((5, 3)).astype(np.float16) for i in range(4)]
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    entries = {
        "decoder/layers/mlp/wo/kernel": Entry((4, 3, 5), tuple(map(reader, stored)), True, True),
        EMBEDDING: Entry((4, 3), (reader(table),)),
        "decoder/decoder_norm/scale": Entry((4,), (reader(table[:, 0]),)),
    }
    found = trees.flatten(places.load(entries, Partitioner()).params)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(found["decoder/layers/mlp/wo/kernel"], np.stack([one.T for one in stored]))
    np.testing.assert_array_equal(found[EMBEDDING], table)
    np.testing.assert_array_equal(found["decoder/decoder_norm/scale"], table[:, 0])


def test_only_the_rows_of_a_box_are_read(monkeypatch):
    monkeypatch.setattr(places, "_BLOCK", 12)
    table, calls = np.arange(60, dtype=np.float32).reshape(10, 6), []
    entry = Entry((2, 6, 10), (reader(table, calls), reader(-table, calls)), True, True)
    box = places.read("x", entry, ((1, 2), (2, 4), (3, 8)))
    np.testing.assert_array_equal(box, -table[3:8, 2:4].T[None])
    assert calls == [(3, 2), (5, 2), (7, 1)]
    assert box.ctypes.data % 64 == 0 and box.flags.c_contiguous


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers(bad):
    table = np.ones((2, 3), np.float32)
    table[1, 1] = bad
    with pytest.raises(UserError, match="token_embedder/embedding that are not finite numbers"):
        places.load({EMBEDDING: Entry((2, 3), (reader(table),))}, Partitioner())


def test_a_cpu_takes_the_buffer_over():
    table = np.ones((256, 64), np.float32)
    seen = []
    original = places.read
    try:
        places.read = lambda *args: seen.append(original(*args)) or seen[-1]
        placed = places.load({EMBEDDING: Entry(table.shape, (reader(table),))}, Partitioner()).params
    finally:
        places.read = original
    assert placed["token_embedder"]["embedding"].unsafe_buffer_pointer() == seen[0].ctypes.data


SHARDED = """
import jax, numpy as np
from promot_jax import trees
from promot_jax.checkpoints import placement as places
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.params import fingerprint as hashing
from promot_jax.params.fingerprint import fingerprint
assert jax.device_count() == 8
stored = [np.random.default_rng(i).standard_normal((16, 8)).astype(np.float32) for i in range(2)]
table, scale, calls = np.arange(128, dtype=np.float32).reshape(16, 8), np.ones(8, np.float32), []
def reader(array, name):
    def read(first, count):
        calls.append((name, first, count))
        return array[first:first + count]
    return read
entries = {
    "decoder/layers/mlp/wi_0/kernel": places.Entry((2, 8, 16), tuple(reader(one, "k") for one in stored), True, True),
    "token_embedder/embedding": places.Entry((16, 8), (reader(table, "t"),)),
    "decoder/decoder_norm/scale": places.Entry((8,), (reader(scale, "s"),)),
}
part = Partitioner(data=2, fsdp=2, model=2)
found = places.load(entries, part).params
flat = trees.flatten(found)
np.testing.assert_array_equal(flat["decoder/layers/mlp/wi_0/kernel"], np.stack([one.T for one in stored]))
np.testing.assert_array_equal(flat["token_embedder/embedding"], table)
assert {one.data.shape for one in flat["token_embedder/embedding"].addressable_shards} == {(8, 4)}
# Twice the embedding's halves (their columns lie apart), and what every device holds is read once.
assert calls.count(("s", 0, 8)) == 1
assert sorted(call for call in calls if call[0] == "t") == [("t", 0, 8)] * 2 + [("t", 8, 8)] * 2
one = fingerprint({"model": jax.tree.map(np.asarray, found)})
hashing._PIECE = 64  # bytes: every leaf in pieces
again = places.load(entries, part)
assert fingerprint({"model": again.params}) == one
assert again.fingerprint == fingerprint(again.params)
"""


def test_eight_devices():
    python(SHARDED, XLA_FLAGS=compilation.flags("--xla_force_host_platform_device_count=8"))
