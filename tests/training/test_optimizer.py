"""Schedules at known steps; optimizers against optax on plain trees and against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.training.optimizer import Optimizer, apply_updates, stochastic_round

SHAPES = {
    "model/token_embedder/embedding": (130, 128),
    "model/decoder/layers/mlp/wo/kernel": (3, 130, 128),  # [layers, in, out]: factored
    "model/decoder/layers/mlp/small/kernel": (3, 8, 128),
    "model/decoder/layers/norm/scale": (3, 128),
    "model/encoder/layers/mlp/wo/kernel": (2, 128, 128),
    "model/decoder/decoder_norm/scale": (128,),
}
PROMPT = {"prompt/task": (130, 128)}


def noise(shapes, seed, scale=1.0):
    """Random leaves; every layer of a stack at its own scale, so that mixing layers would show."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        scales = 10.0 ** np.arange(shape[0]) if "/layers/" in path else 1.0
        return jnp.asarray((scale * scales * draw.normal(size=shape).T).T, jnp.float32)

    return trees.unflatten({path: leaf(path, shape) for path, shape in shapes.items()})


def run(transform, params, grads):
    """The parameters after each step, and the last state."""
    state = jax.jit(transform.init)(params)

    @jax.jit
    def step(params, state, grad):
        updates, state = transform.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for grad in grads:
        params, state = step(params, state, grad)
        history.append(params)
    return history, state


def unstacked(tree):
    """Each layer of each stack as a leaf of its own."""
    flat = {}
    for path, leaf in trees.flatten(tree).items():
        layers = leaf if "/layers/" in path else [leaf]
        flat |= {f"{path}/{index}": layer for index, layer in enumerate(layers)}
    return flat


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=2e-5, atol=1e-6 * np.abs(theirs[path]).max(), err_msg=path)


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 0.4, 7: 0.4, 100: 0.4}),
        ("constant", 4, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.4, 50: 0.4}),
        ("constant", 1, {0: 0.4, 1: 0.4}),
        ("linear", 0, {0: 0.4, 5: 0.2, 9: 0.04, 10: 0.0, 11: 0.0}),
        ("linear", 2, {0: 0.2, 1: 0.4, 2: 0.4, 6: 0.2, 10: 0.0}),
        ("cosine", 0, {0: 0.4, 2.5: 0.4 * (1 + 2**-0.5) / 2, 5: 0.2, 10: 0.0}),
        ("cosine", 2, {0: 0.2, 2: 0.4, 6: 0.2, 10: 0.0}),
        ("linear", 10, {0: 0.04, 9: 0.4}),  # all warm-up
    ],
)
def test_schedules_at_known_steps(schedule, warmup, expected):
    rate = Optimizer(learning_rate=0.4, schedule=schedule, warmup_steps=warmup).rate(10)

    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-7)


def test_the_schedule_is_what_the_optimizer_steps_by():
    settings = Optimizer("adamw", learning_rate=0.4, schedule="linear", warmup_steps=2, eps=0.0)
    params, grad = {"model": {"w": jnp.zeros(3)}}, {"model": {"w": jnp.array([1.0, -2.0, 3.0])}}
    history, _ = run(settings.build(10), params, [grad] * 4)

    # A constant gradient moves Adam by the rate, in the gradient's direction.
    np.testing.assert_allclose(
        [-step["model"]["w"][0] for step in history], np.cumsum([0.2, 0.4, 0.4, 0.35]), rtol=1e-5
    )
    np.testing.assert_allclose(history[-1]["model"]["w"], [-1.35, 1.35, -1.35], rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "adamW"}, r"Unknown Optimizer\.name 'adamW' \(did you mean 'adamw'\?\)"),
        ({"schedule": "cosin"}, r"Unknown Optimizer\.schedule 'cosin' \(did you mean 'cosine'\?\)"),
        ({"learning_rate": float("nan")}, r"Optimizer\.learning_rate is nan; it has to be finite"),
        ({"learning_rate": -0.1}, r"Optimizer\.learning_rate is -0\.1"),
        ({"warmup_steps": -1}, r"Optimizer\.warmup_steps is -1"),
        ({"clip_norm": float("inf")}, r"Optimizer\.clip_norm is inf"),
        ({"decay_offset": -1}, r"Optimizer\.decay_offset is -1"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(UserError, match=message):
        Optimizer(**setting)


# ---- clipping, AdamW -------------------------------------------------------------------------------------------------


def test_clipping_is_by_the_global_norm():
    params = {"model": {"a": jnp.ones(2), "b": jnp.ones(1)}}
    grad = {"model": {"a": jnp.array([2.0, 3.0]), "b": jnp.array([6.0])}}  # norm 7
    for clip, factor in ((3.5, 0.5), (7.5, 1.0), (0.0, 1.0)):
        settings = Optimizer("adamw", learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, clip_norm=clip)
        history, _ = run(settings.build(1), params, [grad])
        # With both betas 0 an update is g / (|g| + eps): g shows.
        for path, leaf in trees.flatten(grad).items():
            clipped = np.asarray(leaf) * factor
            np.testing.assert_allclose(trees.flatten(history[0])[path], 1 - clipped / (clipped + 1), rtol=1e-6)


def test_adamw_is_optax_adamw():
    params, grads = noise(SHAPES | PROMPT, 0), [noise(SHAPES | PROMPT, seed) for seed in (1, 2, 3)]
    settings = Optimizer("adamw", learning_rate=0.01, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6)
    ours, _ = run(settings.build(3), params, grads)
    theirs, _ = run(optax.adamw(0.01, 0.8, 0.95, 1e-6, weight_decay=0.1), params, grads)

    assert_same(trees.flatten(ours[-1]), trees.flatten(theirs[-1]))


# ---- Adafactor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(learning_rate=0.01, schedule="linear", warmup_steps=2),
        Optimizer(learning_rate=0.3, scale_by_parameter=False, weight_decay=1e-3, decay_offset=1000),
        Optimizer(learning_rate=0.01, factored=False, decay_rate=0.7),
    ],
)
def test_stacked_layers_are_treated_as_unstacked_ones(settings):
    params, grads = noise(SHAPES, 0), [noise(SHAPES, seed, scale=seed) for seed in (1, 2, 3)]
    ours, _ = run(settings.build(10), params, grads)
    plain = optax.adafactor(
        settings.rate(10),
        decay_rate=settings.decay_rate,
        decay_offset=-settings.decay_offset,
        multiply_by_parameter_scale=settings.scale_by_parameter,
        weight_decay_rate=settings.weight_decay or None,
        factored=settings.factored,
    )
    theirs, _ = run(plain, unstacked(params), [unstacked(grad) for grad in grads])

    assert_same(unstacked(ours[-1]), theirs[-1])


def test_a_long_prompt_stays_unfactored():
    params, grads = noise(SHAPES | PROMPT, 0), [noise(SHAPES | PROMPT, seed) for seed in (1, 2)]
    settings = Optimizer(learning_rate=0.01)
    ours, state = run(settings.build(10), params, grads)
    theirs, _ = run(
        optax.adafactor(0.01, factored=False), {"prompt": params["prompt"]}, [{"prompt": g["prompt"]} for g in grads]
    )

    assert_same({"prompt/task": ours[-1]["prompt"]["task"]}, trees.flatten(theirs[-1]))
    shapes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys)
        shapes |= {
            (path.split(".")[-1].split("[")[0], name): leaf.shape
            for name in ("task", "wo", "embedding")
            if name in path
        }
    assert shapes["v", "task"] == (130, 128) and shapes["v_row", "task"] == shapes["v_col", "task"] == (1,)
    assert shapes["v", "embedding"] == (1,) and {shapes["v_row", "embedding"], shapes["v_col", "embedding"]} == {
        (130,),
        (128,),
    }
    assert len(shapes["v_row", "wo"]) == 2  # [layers, rows]


def _second_moment(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return next(leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith(".v['prompt']['task']"))


@pytest.mark.parametrize("offset", [0, 100, 1_100_000])
def test_decay_offset_continues_the_step_counter(offset):
    settings = Optimizer(learning_rate=0.3, scale_by_parameter=False, decay_offset=offset)
    params = {"prompt": {"task": jnp.zeros((2, 2))}}
    first, second = jnp.array([[1.0, -2.0], [3.0, -4.0]]), jnp.full((2, 2), 0.1)
    history, state = run(settings.build(10), params, [{"prompt": {"task": grad}} for grad in (first, second)])

    # By hand: v is a mean over steps with decay 1 - step ** -0.8, where the first step is offset + 1.
    decay = [1 - (offset + step) ** -0.8 for step in (1, 2)]
    v1 = (1 - decay[0]) * np.square(first)
    v2 = decay[1] * v1 + (1 - decay[1]) * np.square(second)
    np.testing.assert_allclose(_second_moment(state), v2, rtol=2e-3)  # 1 - decay is near float32's resolution

    position = np.zeros((2, 2))
    for grad, v, after in ((first, v1, history[0]), (second, v2, history[1])):
        update = np.asarray(grad) / np.sqrt(v)
        position -= 0.3 * update / max(1.0, np.sqrt(np.mean(np.square(update))))
        np.testing.assert_allclose(after["prompt"]["task"], position, rtol=2e-3)


def test_a_fresh_counter_shrinks_updates_and_an_inherited_one_does_not():
    """Trap: prompt tuning's rate of 0.3 belongs to a run that inherits step 1.1M."""
    params = {"prompt": {"task": jnp.zeros((4, 4))}}
    grads = [{"prompt": {"task": jnp.full((4, 4), 0.5**step)}} for step in range(6)]
    sizes = {}
    for offset in (0, 1_100_000):
        settings = Optimizer(learning_rate=0.3, scale_by_parameter=False, decay_offset=offset)
        history, _ = run(settings.build(10), params, grads)
        moved = [float(after["prompt"]["task"][0, 0]) for after in history]
        sizes[offset] = -np.diff([0.0, *moved])

    np.testing.assert_allclose(sizes[1_100_000], 0.3, rtol=1e-5)  # always at the clipping threshold
    assert sizes[0][0] == pytest.approx(0.3) and sizes[0][-1] < 0.06


def test_adafactor_decays_weights_per_step_whatever_the_rate():
    params = {"model": {"decoder": {"layers": {"scale": jnp.ones((2, 3))}}}, "prompt": {"task": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    for rate in (0.0, 1.0):
        history, _ = run(Optimizer(learning_rate=rate, weight_decay=0.1).build(10), params, [zero] * 2)
        for leaf in jax.tree.leaves(history[-1]):
            np.testing.assert_allclose(leaf, 0.81, rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_state_has_leaves_of_the_given_parameters_only(name):
    params = noise(PROMPT, 0)
    _, state = run(Optimizer(name, clip_norm=1.0).build(10), params, [noise(PROMPT, 1)])
    full = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]

    assert {leaf.shape for leaf in full} == {(130, 128)}
    assert len(full) == (2 if name == "adamw" else 1)


# ---- weights in bfloat16 ---------------------------------------------------------------------------------------------


@given(st.floats(width=32, allow_nan=False, allow_subnormal=False), st.integers(0, 99))
def test_rounding_gives_a_neighbour_and_keeps_what_bfloat16_can_hold(value, seed):
    rounded = stochastic_round(jnp.float32(value), jax.random.key(seed))
    below = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(jnp.float32(value), jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    above = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(below, jnp.uint32) + jnp.uint32(0x10000), jnp.float32
    )

    assert rounded.dtype == jnp.bfloat16
    exact = float(below) == float(jnp.float32(value))
    assert float(rounded) in ({float(below)} if exact else {float(below), float(above)})


def test_rounding_is_right_in_the_mean():
    values = jnp.asarray([1.0, -1.0, 3e-5, 1e30])[:, None] * (1 + jnp.asarray([1, 20, 64, 127]) / 16384)
    spread = jnp.broadcast_to(values, (20_000, 4, 4))
    rounded = np.asarray(stochastic_round(spread, jax.random.key(0)), np.float64)

    # A unit of bfloat16 is at most a 128th; the mean of 20,000 draws is within five standard errors of half of one.
    assert np.abs(rounded.mean(axis=0) / np.asarray(values, np.float64) - 1).max() < 5 * 0.5 / 128 / 20_000**0.5
    assert (rounded != np.asarray(values)).any()
    for value in (np.nan, np.inf, -np.inf):
        np.testing.assert_equal(float(stochastic_round(jnp.float32(value), jax.random.key(0))), value)


def test_updates_far_below_a_unit_move_weights_in_bfloat16_in_the_mean():
    """A thousandth of what rounding to the nearest would take notice of, 100 times."""
    params = {"kernel": jnp.ones((200, 200), jnp.bfloat16), "scale": jnp.ones(3)}
    updates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 4e-6, jnp.float32), params)
    for step in range(100):
        params = apply_updates(params, updates, jax.random.key(step))

    assert params["kernel"].dtype == jnp.bfloat16 and params["scale"].dtype == jnp.float32
    assert float(params["kernel"].astype(jnp.float32).mean()) == pytest.approx(1 + 4e-4, abs=1e-4)
    np.testing.assert_allclose(params["scale"], 1 + 4e-4, rtol=1e-5)
