"""Losses and divergences on examples with their targets given."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import scipy.stats
import tiny
from forward import target_logits

from promot_jax import main
from promot_jax.config import binding, gin_files
from promot_jax.data import examples
from promot_jax.experiments import given_targets, session
from promot_jax.params import soft_prompts


@pytest.fixture(name="opened", scope="module")
def _opened(tiny_folder: Path) -> session.Session:
    paths = (gin_files.folder() / "finetune.gin", tiny_folder / "tiny.gin")
    job = binding.bind(main.CONFIGURABLES, paths, [])
    return session.open_session(job.keywords["experiment"])


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 200, 4096])
def test_it_is_the_mean_over_the_target_tokens(opened: session.Session, prompted: bool, tokens_per_batch: int) -> None:
    """Optax's cross-entropy of each example alone, without padding or batches."""
    experiment = opened.experiment
    settings = dataclasses.replace(experiment.evaluation, tokens_per_batch=tokens_per_batch, curve_target_examples=5)
    opened = session.with_experiment(opened, dataclasses.replace(experiment, evaluation=settings))
    params = {"model": opened.base.params}
    if prompted:
        rows = np.random.default_rng(0).normal(0, 0.3, (4, tiny.EMBED)).astype(np.float32)
        params["prompt"] = {experiment.task: jax.numpy.asarray(rows)}
    encoder, model = opened.encoder(params.get("prompt")), opened.base.model
    losses: list[float] = []
    of_examples: list[float] = []
    for example in examples.read(experiment.task, "validation", limit=5):
        tokens = encoder.tokens(example)
        batch = model.layout([[tokens]], len(tokens.inputs), len(tokens.targets))
        logits = target_logits(model, params["model"], soft_prompts.table(params.get("prompt")), batch)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).ravel().tolist()
        losses += own
        of_examples.append(float(np.mean(own)))

    measured = given_targets.of_target(opened, params.get("prompt"), "validation", 5)
    assert measured.loss(params) == pytest.approx(np.mean(losses), rel=1e-5)
    assert sorted(measured.losses(params)) == pytest.approx(sorted(of_examples), rel=1e-5)


def test_examples_that_are_too_long_have_no_loss(opened: session.Session) -> None:
    short = dataclasses.replace(opened.experiment, feature_lengths={"inputs": 2, "targets": 1})

    given = given_targets.of_target(session.with_experiment(opened, short), None, "validation", 5)
    assert given.loss({"model": opened.base.params}) is None
    assert given.losses({"model": opened.base.params}) == []


def test_divergence_from_the_base_model(opened: session.Session) -> None:
    """SciPy's relative entropy at every target token of the ICL examples; 0 from itself."""
    base, model = opened.base.params, opened.base.model
    tuned = jax.tree.map(lambda leaf: leaf * 1.1, base)
    given = given_targets.of_icl(opened)
    wanted, count = 0.0, 0.0
    for batch in given._batches:
        before, after = (np.asarray(jax.nn.softmax(target_logits(model, p, None, batch))) for p in (base, tuned))
        wanted += float((scipy.stats.entropy(before, after, axis=-1) * batch["weights"]).sum())
        count += float(batch["weights"].sum())

    assert count > 0 and wanted / count > 1e-4
    assert given.divergence(base, tuned) == pytest.approx(wanted / count, rel=1e-3)
    assert given.divergence(base, base) == pytest.approx(0, abs=1e-6)
