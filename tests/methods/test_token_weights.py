"""Token weights: the loss of each method against its paper's formula in NumPy; the same in ProMoT's second stage."""

import dataclasses

import jax
import numpy as np
import pytest
from forward import target_logits
from scipy.special import log_softmax, softmax

from promot_jax.errors import UserError
from promot_jax.methods import METHODS
from promot_jax.methods.promot import STAGE1
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.training.objective import Losses, batch_loss
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training

VOCAB, PROMPT, PERPLEXITY = 61, 3, 150.0
MODEL = build(DecoderConfig(VOCAB, 16, 2, 1, 1, 8, 24))
INIT = jax.jit(MODEL.init)
PLAIN = Training(1, 4, 1, Optimizer())


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]


def dft(logits, base, targets, real):
    """arXiv 2508.05629, equation of the dynamic weight: `-sg(p) log p`."""
    loss = cross_entropy(logits, targets)
    return (np.exp(-loss) * loss)[real].sum()


def eaft(logits, base, targets, real):
    """arXiv 2601.02151: entropy of the softmax over the 20 largest logits, over 3."""
    top = softmax(np.sort(logits, axis=-1)[..., -20:], axis=-1)
    return (-(top * np.log(top)).sum(axis=-1) / 3 * cross_entropy(logits, targets))[real].sum()


def talr(logits, base, targets, real):
    """arXiv 2509.20758: `exp(-loss / temperature)`, the temperature the median of the batch."""
    loss = cross_entropy(logits, targets)[real]
    return (np.exp(-loss / np.median(loss)) * loss).sum()


def stm(logits, base, targets, real):
    """arXiv 2501.14315: the mean over tokens whose perplexity under the base is at most the threshold."""
    counts = real & (np.exp(cross_entropy(base, targets)) <= PERPLEXITY)
    assert 0 < counts.sum() < real.sum()
    return cross_entropy(logits, targets)[counts].mean() * real.sum()


def asft(logits, base, targets, real):
    """DFT plus 0.1 times KL(base || tuned)."""
    wanted, tuned = log_softmax(base, axis=-1), log_softmax(logits, axis=-1)
    return dft(logits, base, targets, real) + 0.1 * (np.exp(wanted) * (wanted - tuned)).sum(axis=-1)[real].sum()


def flow(logits, base, targets, real):
    """arXiv 2502.02797: `exp(-base loss of the example / median)`, the median here of the batch's own examples."""
    of_example = (cross_entropy(base, targets) * real).sum(axis=-1) / real.sum(axis=-1)
    weights = np.exp(-of_example / np.median(of_example))
    return (weights[:, None] * cross_entropy(logits, targets))[real].sum()


REFERENCES = {"flow": flow, "dft": dft, "eaft": eaft, "talr": talr, "stm": stm, "asft": asft}


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "in stage 2 of ProMoT"])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_is_the_papers(name: str, attached: bool) -> None:
    settings = {"stm_perplexity": PERPLEXITY} if name == "stm" else {}
    method = METHODS[f"promot_{name}" if attached else name](**settings)
    *first, stage = method.stages
    assert stage.trains == ("model",) and stage.prompt == attached and first == [STAGE1] * attached

    noise = np.random.default_rng(0)
    base = INIT(jax.random.key(0))
    base = jax.tree.map(lambda x: x + noise.normal(0, 0.3, x.shape).astype(np.float32), base)
    tuned = jax.tree.map(lambda x: x + noise.normal(0, 0.1, x.shape).astype(np.float32), base)
    prompt = noise.normal(0, 0.3, (PROMPT, 16)).astype(np.float32) if attached else None
    ids = list(range(VOCAB, VOCAB + PROMPT)) if attached else []
    rows = [
        [Tokens([*ids, *noise.integers(0, VOCAB, 5).tolist()], noise.integers(0, VOCAB, n).tolist())]
        for n in (1, 2, 4, 4)
    ]
    batch = decoder_rows(rows, 12, 4)
    constants = ({"prompt": {"task": prompt}} if attached else {}) | ({"start": base} if stage.uses_start else {})
    if stage.objective.calibration_examples:
        losses = cross_entropy(np.asarray(target_logits(MODEL, base, prompt, batch)), batch["targets"])
        means = [row[weights > 0].mean() for row, weights in zip(losses, batch["weights"], strict=True)]
        stage = dataclasses.replace(stage, objective=stage.objective.calibrated(means))
    got = jax.jit(batch_loss(MODEL, stage, PLAIN))({"model": tuned}, constants, batch, jax.random.key(0))
    logits, before = (np.asarray(target_logits(MODEL, params, prompt, batch), np.float64) for params in (tuned, base))
    wanted = REFERENCES[name](logits, before, np.asarray(batch["targets"]), np.asarray(batch["weights"]) > 0)
    assert float(got) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", ["decoder", "t5"])
def test_the_mean_of_an_example_is_that_of_its_segment(family: str) -> None:
    """Two examples of a packed row, and one beside padding."""
    config = DecoderConfig(VOCAB, 16, 2, 1, 1, 8, 24) if family == "decoder" else T5Config(VOCAB, 16, 2, 1, 1, 8, 24)
    model = build(config)
    batch = model.layout([[Tokens([1, 2], [3, 4]), Tokens([5], [6, 7, 8])], [Tokens([9], [10])]], 8, 6)
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    losses = Losses(model, {}, None, batch, 0.0, None, None)

    means = np.where(batch["weights"] > 0, losses.mean_of_example(values), 0)
    assert means == pytest.approx(np.array([[0.5, 0.5, 3, 3, 3, 0], [6, 0, 0, 0, 0, 0]]))


def test_flow_takes_the_median_as_temperature() -> None:
    (stage,) = METHODS["flow"](flow_examples=3).stages
    assert stage.objective.calibration_examples == 3
    assert stage.objective.calibrated([4.0, 1.0, 2.5]).temperature == 2.5
    assert stage.recorded() == {"flow_examples": 3, "temperature": None}


def test_flow_needs_examples() -> None:
    with pytest.raises(UserError, match="FLOW_EXAMPLES"):
        METHODS["flow"](flow_examples=0).check()
