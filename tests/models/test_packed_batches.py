"""A packed batch has the loss and the gradients of the plain one, by every parameter and every soft prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FAMILIES

from promot_jax import trees
from promot_jax.data.packing import Packer
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens
from promot_jax.training.losses import chunked_cross_entropy

pytestmark = pytest.mark.usefixtures("fast_compilation")
CONFIGS = {
    "llama": DecoderConfig(61, 48, 4, 2, 2, 12, 40),
    **{name: dataclasses.replace(config, num_layers=2) for name, config in FAMILIES.items()},
    "t5": T5Config(61, 32, 4, 2, 2, 8, 40, relative_buckets=8, relative_max_distance=12),
}
VOCAB, ROWS, INPUTS, TARGETS = 61, 8, 40, 6
PROMPTS = {"one": [(61, 66)], "several": [(61, 66), (66, 69), (69, 76)], "none": [(0, 0)]}


def examples(prompts, low=2, high=14):
    """Some start with the same tokens after their prompt, as texts of a template do."""
    noise = np.random.default_rng(1)
    for i in range(ROWS):
        ids = noise.integers(0, VOCAB, noise.integers(low, high)).tolist()
        text = [7, 8, *ids] if prompts == "one" else ids
        yield Tokens([*range(*PROMPTS[prompts][i % len(PROMPTS[prompts])]), *text], ids[-1 - i % 4 :])


@functools.cache
def loss_and_gradients(name):
    config = CONFIGS[name]
    model = build(config)
    noise = np.random.default_rng(0)
    shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    drawn = {
        path: jnp.asarray(noise.normal(path.endswith("scale"), 0.15, leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
    }
    params, table = trees.unflatten(drawn), jnp.asarray(noise.normal(size=(15, config.emb_dim)), jnp.float32)

    def loss(params, table, batch):
        hidden = model.hidden(params, table, batch)
        return chunked_cross_entropy(model, params, hidden, batch["targets"], batch["weights"], 0.1)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return model, lambda batch: gradient(params, table, batch)


def check(name, prompts):
    model, measure = loss_and_gradients(name)
    rows = [[example] for example in examples(prompts)]
    packer = Packer(model, ROWS, INPUTS, TARGETS)
    shapes = packer.choose([rows])
    packed, plain, shape = packer.layout(rows, shapes), packer.layout(rows, shapes[1:]), shapes[0]
    assert packed["tokens"].shape == (shape.rows, shape.length) and shape.rows < ROWS
    if prompts == "one" and name != "t5":
        assert (packed["tokens"] == VOCAB).sum() == shape.rows  # a prompt per row, of which the others are compared
    (loss, gradients), (wanted, theirs) = measure(packed), measure(plain)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    for path, leaf in trees.flatten({"model": theirs[0], "prompt": {"all": theirs[1]}}).items():
        ours = trees.flatten({"model": gradients[0], "prompt": {"all": gradients[1]}})[path]
        assert prompts == "none" or np.abs(leaf).max() > 0
        np.testing.assert_allclose(ours, leaf, rtol=1e-5, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_packed_is_plain(name, prompts):
    check(name, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen2", "qwen3"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_packed_is_plain_in_the_other_families(name, prompts):
    check(name, prompts)
