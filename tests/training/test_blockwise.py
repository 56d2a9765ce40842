"""An update in blocks against the same optax transformation on whole leaves; its memory; where it applies."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from promot_jax import trees
from promot_jax.training import blockwise
from promot_jax.training.optimizer import Optimizer, build
from promot_jax.training.settings import Training

# In blocks of 64 elements: several rows of a block, a stack, a prime number of rows, rows longer than a block, small
# leaves.
SHAPES = {"table": (40, 8), "stack": (3, 12, 6), "prime": (37, 8), "long": (6, 80), "norm": (3, 5), "scalar": ()}
CLIPPED = Optimizer("adamw", 0.01, "linear", warmup_steps=2, clip_norm=0.5, weight_decay=0.1)


def tree(seed):
    noise = np.random.default_rng(seed)
    leaves = {name: np.float32(noise.normal(size=shape)) for name, shape in SHAPES.items()}
    return {"model": jax.device_put(leaves)}


@pytest.mark.parametrize(
    "settings", [CLIPPED, Optimizer("adamw", 0.1, b1=0.5, b2=0.7, clip_norm=1e3), Optimizer("adamw")]
)
def test_blocks_are_updated_as_whole_leaves_are(settings, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    transform = build(3, settings)
    params = expected = tree(0)
    state = expected_state = transform.init(params)
    whole, in_blocks = jax.jit(transform.update), jax.jit(partial(blockwise.update, transform))
    for seed in (1, 2, 3):
        grads = tree(seed)
        updates, expected_state = whole(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
        params, state, norm = in_blocks(grads, state, params, optax.tree.norm(grads))

        np.testing.assert_allclose(norm, optax.tree.norm(updates), rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)  # checkpoints stay as they are
    for mine, theirs in zip(jax.tree.leaves((params, state)), jax.tree.leaves((expected, expected_state)), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((40, 8), (8, 8)), ((3, 12, 6), (9, 6)), ((37, 8), (37, 8)), ((6, 80), (1, 80)), ((5,), (1, 5)), ((), (1, 1))],
)
def test_blocks_are_whole_rows_of_a_leaf(shape, block, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    assert blockwise._block_shape(shape) == block


def test_an_update_copies_no_leaf():
    """Parameters and moments are updated in place, and nothing of a leaf's size is made beside them."""
    shapes = {"model": {name: jax.ShapeDtypeStruct((512, 1024), jnp.float32) for name in ("a", "b")}}
    transform = build(3, CLIPPED)
    arguments = shapes, jax.eval_shape(transform.init, shapes), shapes, jax.ShapeDtypeStruct((), jnp.float32)

    def in_blocks(params, state, grads, norm):
        return blockwise.update(transform, grads, state, params, norm)

    def whole(params, state, grads, norm):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norm + optax.tree.norm(updates)

    blocks, leaves = (
        jax.jit(run, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis() for run in (in_blocks, whole)
    )
    leaf = 4 * 512 * 1024
    assert blocks.alias_size_in_bytes >= 6 * leaf
    assert blocks.temp_size_in_bytes < leaf <= leaves.temp_size_in_bytes  # the test can tell


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"optimizer": Optimizer("adafactor")}, False),
        ({"prompt_optimizer": Optimizer("adamw")}, False),
    ],
)
def test_it_is_adamws_alone(changes, expected):
    training = dataclasses.replace(Training(2, 2, 2, Optimizer("adamw")), **changes)
    params = tree(0)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert blockwise.applies(training, params, places) is expected
    assert not blockwise.applies(training, params, None)
    assert not blockwise.applies(training, trees.flatten(params) | {"half": jnp.ones(2, jnp.bfloat16)}, places)
