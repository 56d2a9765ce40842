"""The loss in chunks: the number and the gradients of the whole, and never all logits of a large vocabulary."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from promot_jax import trees
from promot_jax.methods.base import Objective, Stage
from promot_jax.methods.kl import Divergence
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens
from promot_jax.training import losses
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.state import TrainState
from promot_jax.training.step import make_step

BATCH, TARGETS, VOCAB, EMBED = 6, 7, 61, 16


@pytest.fixture(name="case", scope="module")
def _case():
    """A model, its parameters, hidden states, targets, and weights with padding and with other values than 0 and 1."""
    noise = np.random.default_rng(0)
    model = build(DecoderConfig(VOCAB, EMBED, 2, 1, 1, 8, 24, tied_embeddings=False))
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jnp.asarray(noise.normal(size=(BATCH, TARGETS, EMBED)), jnp.float32)
    targets = jnp.asarray(noise.integers(0, VOCAB, (BATCH, TARGETS)), jnp.int32)
    weights = jnp.asarray(noise.choice([0.0, 1.0, 0.5], (BATCH, TARGETS)), jnp.float32)
    return model, params, hidden, targets, weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("positions", [0, 1, 3, 6])  # 0: less than one position of the batch
def test_chunks_equal_the_whole(case, smoothing, positions, monkeypatch):
    model, params, hidden, targets, weights = case
    monkeypatch.setattr(losses, "CHUNK", positions * BATCH * VOCAB)

    def whole(params, hidden):
        return losses.cross_entropy(model.head(params, hidden), targets, weights, smoothing)

    def chunked(params, hidden):
        return losses.chunked_cross_entropy(model, params, hidden, targets, weights, smoothing)

    expected, expected_grads = jax.value_and_grad(whole, (0, 1))(params, hidden)
    loss, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(params, hidden)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for ours, expected_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, expected_leaf, rtol=1e-5, atol=1e-5 * np.abs(expected_leaf).max())


@pytest.mark.parametrize("positions", [0, 3, 7])
def test_divergence_in_chunks_is_that_of_the_whole(case, positions, monkeypatch):
    model, params, hidden, _, weights = case
    monkeypatch.setattr(losses, "CHUNK", positions * BATCH * 2 * VOCAB)
    base = jax.tree.map(lambda x: 0.8 * x, params)

    def whole(params, hidden):
        ours, theirs = (jax.nn.log_softmax(model.head(p, h)) for p, h in ((params, hidden), (base, hidden + 0.1)))
        return ((jnp.exp(theirs) * (theirs - ours)).sum(-1) * weights).sum()

    def chunked(params, hidden):
        return losses.chunked_divergence(model, params, hidden, base, hidden + 0.1, weights)

    expected, expected_grads = jax.value_and_grad(whole, (0, 1))(params, hidden)
    lowered = jax.jit(jax.value_and_grad(chunked, (0, 1)))
    loss, grads = lowered(params, hidden)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for ours, expected_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, expected_leaf, rtol=1e-4, atol=1e-5 * np.abs(expected_leaf).max())
    assert ("while" in lowered.lower(params, hidden).as_text()) == (positions < TARGETS)


def test_what_fits_is_not_cut(case, monkeypatch):
    model, params, hidden, targets, weights = case

    def lowered(chunk):
        def whole(hidden):
            return losses.chunked_cross_entropy(model, params, hidden, targets, weights, 0.1)

        monkeypatch.setattr(losses, "CHUNK", chunk)
        return jax.jit(whole).lower(hidden).as_text()

    def whole(hidden):
        return losses.cross_entropy(model.head(params, hidden), targets, weights, 0.1)

    size = BATCH * TARGETS * VOCAB
    assert lowered(size) == jax.jit(whole).lower(hidden).as_text()
    assert "while" in lowered(size - 1)


# ---- mT5's vocabulary, compiled only ---------------------------------------------------------------------------------

VOCABULARY = 250_112
LARGE = {
    "decoder": DecoderConfig(VOCABULARY, 24, 2, 1, 1, 8, 32, tied_embeddings=False),
    "mT5": T5Config(VOCABULARY, 24, 2, 1, 1, 8, 32),
}
ROWS, AIMS, PROMPT = 16, 64, 4
LOGITS = ROWS * AIMS * VOCABULARY


@functools.cache
def update(family, trains, kl=0.0):
    """The lowered update of a stage, from shapes alone."""
    model = build(LARGE[family])
    params = {"model": jax.eval_shape(model.init, jax.random.key(0))}
    params["prompt"] = {"task": jax.ShapeDtypeStruct((PROMPT, model.config.emb_dim), np.float32)}
    trained, frozen = trees.partition(params, lambda path: path.startswith(trains))
    transform = optax.sgd(1.0)
    state = TrainState(trained, jax.eval_shape(transform.init, trained), jnp.int32(0))
    rows = model.layout([[Tokens([1, 2], [3] * AIMS)] for _ in range(ROWS)], AIMS + 8, AIMS)
    frozen |= {"start": trained["model"]} if kl else {}
    stage = Stage("stage", trains=(trains,), objective=Divergence(kl) if kl else Objective())
    step = make_step(model, transform, stage, Training(1, ROWS, 1, Optimizer()), None)
    return step.lower(state, frozen, rows, jax.random.key(0))


def shapes(text):
    return {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]\w*>", text)}


@pytest.mark.parametrize("family", LARGE)
@pytest.mark.parametrize("trains", ["prompt", "model"])
def test_no_array_is_as_large_as_all_logits(family, trains):
    with_vocabulary = {shape for shape in shapes(update(family, trains).as_text()) if VOCABULARY in shape}

    assert (ROWS, 8, VOCABULARY) in with_vocabulary  # 8 chunks of 8 positions
    assert max(map(math.prod, with_vocabulary)) <= losses.CHUNK < LOGITS / 7


@pytest.mark.parametrize("family", LARGE)
def test_nor_with_the_divergence_from_the_base_model(family):
    with_vocabulary = {shape for shape in shapes(update(family, "model", 1.0).as_text()) if VOCABULARY in shape}

    assert {(ROWS, 8, VOCABULARY), (ROWS, 4, VOCABULARY)} <= with_vocabulary  # two models' logits: half the positions
    assert max(map(math.prod, with_vocabulary)) <= losses.CHUNK


@pytest.mark.parametrize("family", LARGE)
def test_a_frozen_head_gets_no_gradient(family):
    kernel = f"-> tensor<{LARGE[family].emb_dim}x{VOCABULARY}xf32>"
    products = {
        trains: sum("dot_general" in line and kernel in line for line in update(family, trains).as_text().splitlines())
        for trains in ("prompt", "model")
    }

    assert products == {"prompt": 0, "model": 1}


@pytest.mark.parametrize("family", LARGE)
def test_memory_is_that_of_a_few_chunks(family):
    chunk, logits = 4 * losses.CHUNK, 4 * LOGITS
    used = update(family, "prompt").compile().memory_analysis().temp_size_in_bytes

    assert chunk / 2 < used < 5 * chunk < logits
