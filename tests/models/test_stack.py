"""Layers apart share the memory of the stack; caches whose slots are a ring, by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import DecoderConfig, build, stack


def test_layers_apart_are_those_of_the_stack_in_its_memory() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 16, 32))  # XLA's own memory: NumPy's could not be donated
    half = jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)
    layers = stack.apart({"decoder": {"layers": {"a": {"kernel": kernel}, "b": half}, "norm": half}}, Partitioner())
    assert layers["decoder"]["norm"] is half and len(layers["decoder"]["layers"]) == 3
    for index, layer in enumerate(layers["decoder"]["layers"]):
        assert np.array_equal(layer["a"]["kernel"], kernel[index]) and np.array_equal(layer["b"], half[index])
        start = kernel.unsafe_buffer_pointer() + index * kernel.nbytes // 3
        assert layer["a"]["kernel"].unsafe_buffer_pointer() == start
    del layer, layers
    before = kernel.unsafe_buffer_pointer()
    moved = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)(kernel)
    assert moved.unsafe_buffer_pointer() == before  # nothing holds on to the stack: training may donate it


def test_a_cache_of_bfloat16_is_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are the same, bit by bit: attention computes in float32 in any case."""
    config = DecoderConfig(64, 32, 4, 2, 3, 8, 48, dtype="bfloat16", attention="xla")
    params = jax.jit(build(config).init)(jax.random.key(0))
    inputs = {"tokens": jnp.array([[1, 2, 3, 0], [4, 0, 0, 0]]), "lengths": jnp.array([3, 1])}
    logits = {}
    for platform, dtype in (("tpu", "bfloat16"), ("cpu", "float32")):
        monkeypatch.setattr(partitioning, "device_of", lambda _, name=platform: SimpleNamespace(platform=name))
        model = build(config)
        first, state = model.prefill(params, None, inputs, 4)
        assert {leaf.dtype for leaf in jax.tree.leaves(state["cache"])} == {jnp.dtype(dtype)}
        logits[platform] = [first]
        for _ in range(3):
            following, state = model.step(params, state, jnp.argmax(logits[platform][-1], -1))
            logits[platform].append(following)
    for ours, theirs in zip(logits["cpu"], logits["tpu"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_axis_laid_into_a_ring() -> None:
    new = jnp.array([[1, 2, 3]])
    assert stack.in_ring(new, 5, 3, axis=1, fill=9).tolist() == [[1, 2, 3, 9, 9]]
    assert stack.in_ring(new, 5, 1, axis=1, fill=9).tolist() == [[3, 9, 9, 1, 2]]
    assert stack.in_ring(new, 3, 0, axis=1).tolist() == [[1, 2, 3]]


def test_rows_join_a_cache_stacked_or_apart() -> None:
    noise = np.random.default_rng(0)
    shape = (2, 4, 1, 5, 3)  # layers, batch, heads, slots, head_dim
    cache = {name: jnp.asarray(noise.normal(size=shape)) for name in ("key", "value")}
    new = {name: jnp.asarray(noise.normal(size=(2, 3, 1, 2, 3))) for name in cache}
    rows, cursor = jnp.array([3, 4, 0]), 1  # the second row is padding
    joined = stack.join_cache(cache, new, rows, cursor)
    for name, leaf in joined.items():
        for row, source in ((3, 0), (0, 2)):
            np.testing.assert_array_equal(leaf[:, row, :, [4, 0]], jnp.moveaxis(new[name][:, source], 2, 0))
        np.testing.assert_array_equal(leaf[:, 1:3], cache[name][:, 1:3])
    layers = tuple(jax.tree.map(lambda leaf, index=index: leaf[index], cache) for index in range(2))
    for index, own in enumerate(stack.join_cache(layers, new, rows, cursor)):
        assert all(np.array_equal(own[name], joined[name][index]) for name in own)


def test_rows_move_to_a_larger_ring() -> None:
    noise = np.random.default_rng(0)
    cache = {name: jnp.asarray(noise.normal(size=(2, 4, 1, 5, 3))) for name in ("key", "value")}
    rows, cursor = jnp.array([3, 1, -1]), 2
    moved = stack.move_cache(cache, rows, 7, cursor)
    for name, leaf in moved.items():
        assert leaf.shape == (2, 3, 1, 7, 3) and not leaf[:, :, :, :2].any()
        for row, source in ((0, 3), (1, 1)):  # the last token stays right before the cursor, which is 0
            np.testing.assert_array_equal(leaf[:, row, :, 2:], cache[name][:, source][:, :, jnp.array([2, 3, 4, 0, 1])])
    layers = tuple(jax.tree.map(lambda leaf, index=index: leaf[index], cache) for index in range(2))
    for index, own in enumerate(stack.move_cache(layers, rows, 7, cursor)):
        assert all(np.array_equal(own[name], moved[name][index]) for name in own)
