"""The formulas' FLOPs against the products in the models' own traces; what bounds a step; what does not fit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from forward import target_logits
from jax.extend.core import jaxprs_in_params

from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens
from promot_jax.precompile import roofline
from promot_jax.precompile.hlo import Cost

CONFIGS = {
    "llama": DecoderConfig(96, 32, 4, 2, 3, 8, 48, tied_embeddings=False),
    "gemma": DecoderConfig(96, 32, 4, 1, 3, 16, 48, window=4, global_every=2, qk_norm=True, post_norms=True),
    "mt5": T5Config(96, 32, 4, 2, 3, 8, 48),
    "t5": T5Config(96, 32, 4, 3, 2, 8, 48, ("relu",), tied_embeddings=True),
}
ROWS, INPUTS, TARGETS, STEPS, BEAMS = 3, 12, 5, 4, 2


def products(jaxpr, skip=()):
    """FLOPs of all matrix products of a trace, bodies of scans as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape not in skip:
            (contracting, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner, skip)
    return total


def traced(function, *arguments):
    return jax.make_jaxpr(function)(*arguments).jaxpr


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_are_the_products_of_the_trace(name):
    model = build(CONFIGS[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    row = Tokens(list(range(INPUTS)), list(range(TARGETS)))
    batch = model.layout([[row]] * ROWS, INPUTS, TARGETS)
    heads = {(4, length, length) for length in (INPUTS, TARGETS)}  # relative positions' one-hot products, once a stack

    found = products(traced(lambda params, batch: target_logits(model, params, None, batch), params, batch), heads)
    assert found == roofline.forward_flops(model.config, ROWS, INPUTS, TARGETS, TARGETS)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_flops_are_the_products_of_its_parts(name):
    model = build(CONFIGS[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    inputs = {"tokens": jnp.zeros((ROWS, INPUTS), jnp.int32), "lengths": jnp.full(ROWS, INPUTS)}
    heads = {(4, INPUTS, INPUTS), (4, 1, STEPS + 1)}
    start = products(traced(lambda params, inputs: model.prefill(params, None, inputs, STEPS), params, inputs), heads)
    wide = {name: jnp.repeat(array, BEAMS, axis=0) for name, array in inputs.items()}
    state = jax.eval_shape(lambda params, inputs: model.prefill(params, None, inputs, STEPS), params, wide)[1]
    step = products(traced(model.step, params, state, jnp.zeros(ROWS * BEAMS, jnp.int32)), heads)

    assert start + (STEPS - 1) * step == roofline.decoding_flops(model.config, ROWS, INPUTS, STEPS, BEAMS)


def test_six_flops_per_parameter_and_token():
    """The rule of thumb of training, forward and backward, holds for a decoder where its context is short."""
    config = dataclasses.replace(CONFIGS["llama"], emb_dim=1024, head_dim=256, mlp_dim=4096, vocab_size=2048)
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    kernels = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1)
    kernels -= 2048 * 1024 + sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes) if leaf.shape == (3, 1024))
    trained = 3 * roofline.forward_flops(config, 1, 0, 8, 8)
    assert trained == pytest.approx(6 * kernels * 8, rel=0.01)


def test_the_slowest_of_three_bounds_a_step():
    chip = roofline.Chip(memory=100, flops=10.0, bandwidth=5.0, links=2.0)
    cost = Cost(flops=20.0, bytes=5.0)
    cost.collectives["all-gather"] = 1
    assert roofline.bounds(cost, chip, 1) == {
        "seconds": {"compute": 2.0, "memory": 1.0, "links": 0.5},
        "step_seconds": 2.0,
        "bound": "compute",
    }
    cost.collectives["all-reduce"] = 9
    assert roofline.bounds(cost, chip, 2)["bound"] == "links"
    assert roofline.bounds(cost, chip, 2)["step_seconds"] == 10.0
    assert roofline.bounds(dataclasses.replace(cost, kernel_flops=50.0), chip, 2)["seconds"]["compute"] == 14.0
    cost.network = 6.0
    assert "network" not in roofline.bounds(cost, chip, 2)["seconds"]  # of a speed that nobody says
    assert roofline.bounds(cost, dataclasses.replace(chip, network=1.0), 2)["bound"] == "network"
    assert roofline.bounds(cost, dataclasses.replace(chip, network=1.0), 2)["step_seconds"] == 12.0


def test_counts_that_disagree_are_named():

    def found(flops, traffic, model, held=150.0):
        compiler = {"flops": flops, "bytes accessed": traffic}
        return roofline.checks(Cost(40.0, 80.0), Cost(10.0, 20.0), compiler, held, model, devices=8, share=(0.95, 1.4))

    assert found(11.0, 21.0, model=300.0) == []
    assert found(5.0, 21.0, 300.0) == ["the compiler counts 5 FLOPs with every loop run once, and we 10"]
    assert found(11.0, 10.0, 300.0) == ["the compiler counts 10 bytes with every loop run once, and we 20"]
    (wrong,) = found(11.0, 21.0, 300.0, held=170.0)
    assert wrong == "the arguments have 170 bytes, and we count 80 that are moved"
    (wrong,) = found(11.0, 21.0, 100.0)
    assert "3.20 times what the model asks for, which should be 0.95 to 1.40" in wrong
    assert len(found(99.0, 9.0, 1000.0, held=999.0)) == 4


@pytest.mark.parametrize(
    ("parameters", "temporaries", "trains", "said"),
    [
        (4, 10, True, "fits: 14.00 of 16 GiB"),
        (14, 4, True, "does not fit: 18.00 of 16 GiB; split the parameters further"),
        (4, 40, True, 'set remat = "full"'),
        (4, 40, False, "take fewer rows at a time"),
    ],
)
def test_verdicts(parameters, temporaries, trains, said):
    gib = roofline.GIB
    memory = {"parameters": parameters * gib, "optimizer": 0.0, "base": 0.0, "total": (parameters + temporaries) * gib}
    assert said in roofline.verdict(memory, roofline.CHIPS["v5e"], trains)
