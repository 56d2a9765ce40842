"""A packed batch has the loss and the gradients of the plain one, by every parameter and every soft prompt."""

import dataclasses
import functools
import itertools

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

CONFIGS = {
    "llama": DecoderConfig(61, 48, 4, 2, 2, 12, 40),
    **{name: dataclasses.replace(config, num_layers=2) for name, config in FAMILIES.items()},
    "t5": T5Config(61, 32, 4, 2, 2, 8, 40, relative_buckets=8, relative_max_distance=12),
}
VOCAB, ROWS, INPUTS, TARGETS = 61, 8, 40, 6
# Virtual ids of the examples' prompts, in turn; an example without one starts with a token of its own.
PROMPTS = {"one": [(61, 66)], "mixed": [(61, 66), (61, 66), (66, 69), (0, 0)]}


def examples(prompts):
    """With the first prompt they go on with the same tokens, as texts of a template do."""
    noise = np.random.default_rng(1)
    for i in range(ROWS):
        start, end = PROMPTS[prompts][i % len(PROMPTS[prompts])]
        ids = noise.integers(0, VOCAB, noise.integers(2, 14)).tolist()
        yield Tokens([*range(start, end), *([7, 8] if start == VOCAB else []), *ids], ids[-1 - i % 4 :])


def loss_and_gradients(model):
    """Returns a function of a batch: its loss, and the gradients by all parameters and the table of soft prompts."""
    noise = np.random.default_rng(0)
    shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    drawn = {
        path: jnp.asarray(noise.normal(path.endswith("scale"), 0.15, leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
    }
    table = jnp.asarray(noise.normal(size=(8, model.config.emb_dim)), jnp.float32)

    def loss(tree, batch):
        hidden = model.hidden(tree["model"], tree["prompt"], batch)
        return chunked_cross_entropy(model, tree["model"], hidden, batch["targets"], batch["weights"], 0.1)

    return functools.partial(jax.jit(jax.value_and_grad(loss)), {"model": trees.unflatten(drawn), "prompt": table})


def check(name, prompts):
    model = build(CONFIGS[name])
    measure = loss_and_gradients(model)
    rows = [[example] for example in examples(prompts)]
    shapes = Packer(model, ROWS, INPUTS, TARGETS).choose([rows])
    packed, plain = (Packer(model, ROWS, INPUTS, TARGETS).layout(rows, some) for some in (shapes, shapes[1:]))
    assert packed["tokens"].shape == shapes[0][:2] and shapes[0].rows < len(plain["tokens"]) == ROWS
    if name != "t5":  # a row has a prompt once
        assert (packed["tokens"] == VOCAB).sum() <= shapes[0].rows < (plain["tokens"] == VOCAB).sum()
    (loss, ours), (wanted, theirs) = measure(packed), measure(plain)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    for path, leaf in theirs.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_packed_is_plain(name):
    check(name, "mixed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompts"),
    [*itertools.product(CONFIGS, ["one"]), *itertools.product(["gemma2", "qwen2", "qwen3"], ["mixed"])],
)
def test_packed_is_plain_in_the_other_families(name, prompts):
    check(name, prompts)
