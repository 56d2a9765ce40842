"""The state builder: of shapes it builds what it builds of arrays, on the same places, and allocates nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax import trees
from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.methods.finetune import FINETUNE
from promot_jax.methods.l2sp import L2sp
from promot_jax.methods.lora import LoraTuning
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.models import DecoderConfig, build
from promot_jax.params.lora import Lora
from promot_jax.training import state
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.step import make_step

MODEL = build(DecoderConfig(61, 16, 2, 1, 2, 8, 24, tied_embeddings=False, dtype="bfloat16"))
(LORA,) = LoraTuning(lora=Lora(rank=2)).stages
(L2SP,) = L2sp().stages
TRAINING = Training(2, 2, 2, Optimizer("adamw", clip_norm=1.0))


@pytest.fixture(name="params", scope="module")
def _params():
    params = {"model": jax.jit(MODEL.init)(jax.random.key(0)), "prompt": {"task": jnp.ones((4, 16))}}
    params["lora"] = Lora(rank=2).init(jax.random.key(1), params["model"])
    return Partitioner().place(params)


def setup(params, stage, training):
    subtrees = ("model", *(["prompt"] if stage.prompt else []), *(["lora"] if stage.lora else []))
    return state.build(MODEL, {name: params[name] for name in subtrees}, stage, training, Partitioner())


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (STAGE1, {"optimizer": Optimizer("adafactor")}),
        (STAGE2, {"weight_dtype": "bfloat16", "freeze": ("model/decoder/layers_0/.*",)}),
        (FINETUNE, {}),
        (L2SP, {}),
        (LORA, {}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shapes_give_the_shapes_of_what_arrays_give(params, stage, changes):
    training = dataclasses.replace(TRAINING, **changes)
    shapes = jax.tree.map(lambda leaf: state.placed(leaf, leaf.sharding), params)
    concrete = setup(params, stage, training)[:3]
    before = len(jax.live_arrays())
    abstract = setup(shapes, stage, training)[:3]

    assert len(jax.live_arrays()) == before
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert {type(leaf) for leaf in jax.tree.leaves(abstract)} == {jax.ShapeDtypeStruct}
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


def test_the_state_may_be_donated(params):
    """The caller's parameters, and those that the loss compares with, outlive it."""
    before = {path: np.array(leaf) for path, leaf in trees.flatten(params).items()}
    fresh, constants, _, _ = setup(params, L2SP, TRAINING)
    jax.tree.map(lambda leaf: leaf.delete(), fresh)

    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, before[path])
    for path, leaf in trees.flatten({"model": constants["start"]}).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_lora_is_merged_into_float32_kernels(params, monkeypatch):
    """The step multiplies by frozen kernels in the model's dtype; an evaluation adds LoRA to those as they were."""
    monkeypatch.setattr(partitioning, "device_of", lambda _: SimpleNamespace(platform="tpu"))
    _, constants, rest, _ = setup(params, LORA, TRAINING)
    kernels = [path for path in trees.flatten(rest) if path.endswith("/kernel")]
    assert {trees.flatten(constants)[path].dtype for path in kernels} == {jnp.dtype("bfloat16")}
    assert all(trees.flatten(rest)[path] is trees.flatten(params)[path] for path in kernels)


def test_stages_of_equal_settings_share_one_step(params):
    """As those of a sweep's seeds: the second is neither traced nor compiled."""

    def step(training):
        built, _, _, transform = setup(params, FINETUNE, training)
        return make_step(MODEL, transform, FINETUNE, training, state.shardings(built))

    again = dataclasses.replace(TRAINING, optimizer=dataclasses.replace(TRAINING.optimizer))
    assert step(TRAINING) is step(again)
    for change in ({"freeze": ("model/token_embedder/.*",)}, {"optimizer": Optimizer("adamw", 0.5)}):
        assert step(dataclasses.replace(TRAINING, **change)) is not step(TRAINING)
