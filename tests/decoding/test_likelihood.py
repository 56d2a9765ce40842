"""Log-likelihoods of continuations against a plain loop over PyTorch models with the same weights."""

import dataclasses
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import torch

from promot_jax.checkpoints.huggingface import load
from promot_jax.decoding.continuous_batching import generate_all
from promot_jax.decoding.inputs import Engine, Input
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import CONFIGS, build

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(params=["Llama", "Gemma 3", "T5 1.0"], name="pair", scope="module")
def _pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    """A model as we have it and as transformers does."""
    theirs, folder = hf_models.variant(request.param), tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    loaded = load.read(Path(folder), Partitioner())
    model = build(CONFIGS[loaded.family](**loaded.config))
    stops, key, settings = np.zeros(model.config.vocab_size, bool), jax.random.key(0), Decoding(max_tokens=5)
    return Engine(model, settings, loaded.placed.params, None, stops, key, Partitioner(), 256, 1024), theirs


def likelihoods(engine: Engine, inputs: list[Input]) -> list[Any]:
    """Those of the continuations of each input."""
    return [output.likelihoods for output in sorted(generate_all(engine, inputs), key=lambda output: output.member)]


def by_torch(model: Any, ids: list[int], continuation: list[int], continues: bool) -> float:
    if continues:
        logits = model(input_ids=torch.tensor([ids + continuation])).logits[0, len(ids) - 1 : -1]
    else:
        start = torch.tensor([[0, *continuation[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0]
    return float(torch.log_softmax(logits, -1)[range(len(continuation)), continuation].sum())


@pytest.fixture(name="scored", scope="module")
def _scored(pair: tuple[Engine, Any]) -> tuple[list[Input], list[list[float]]]:
    """Inputs with continuations, and what PyTorch says of these."""
    engine, theirs = pair
    noise = np.random.default_rng(0)
    start = noise.integers(2, 250, 34).tolist()
    inputs = []
    for size, lengths in zip((1, 4, 9, 20, 2), ((1, 1), (2, 3, 1), (1, 4), (1, 2, 3), (3, 3)), strict=True):
        ids = [*start, *noise.integers(2, 250, size).tolist()]
        continuations = tuple(tuple(noise.integers(2, 250, length).tolist()) for length in lengths)
        inputs.append(Input(ids, 5, continuations=continuations))
    with torch.no_grad():
        want = [
            [by_torch(theirs, each.ids, list(ids), engine.model.continues) for ids in each.continuations]
            for each in inputs
        ]
    return inputs, want


@pytest.mark.parametrize("group", ["", "a"])  # with the prefix that they share processed once, too
def test_sums_of_log_probabilities(pair: tuple[Engine, Any], scored: Any, group: str) -> None:
    engine, (inputs, want) = pair[0], scored
    found = likelihoods(engine, [dataclasses.replace(each, group=group) for each in inputs])
    for scores, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_first_tokens_may_be_unscored(pair: tuple[Engine, Any], scored: Any) -> None:
    """As a sentinel is."""
    (engine, theirs), (inputs, want) = pair, scored
    with torch.no_grad():
        first = [by_torch(theirs, inputs[2].ids, [*ids[:1]], engine.model.continues) for ids in inputs[2].continuations]
    (rest,) = likelihoods(engine, [dataclasses.replace(inputs[2], unscored=1)])
    np.testing.assert_allclose(rest, np.subtract(want[2], first), rtol=1e-4, atol=1e-4)


def check_generation(engine: Engine, inputs: list[Input], want: list[list[float]]) -> None:
    """The outputs are those of the inputs without continuations, beside which they may stand."""
    bare = [dataclasses.replace(each, continuations=()) for each in inputs]
    mixed = [*(dataclasses.replace(each, group="a") for each in inputs), *bare]
    found = sorted(generate_all(engine, mixed), key=lambda output: output.member)
    for output, again, scores in zip(found[: len(inputs)], found[len(inputs) :], want, strict=True):
        np.testing.assert_allclose(output.likelihoods, scores, rtol=1e-4, atol=1e-4)
        assert again.likelihoods is None and np.array_equal(output.ids, again.ids)
    assert len({tuple(output.ids) for output in found}) == len(inputs)


def test_generation_scores_them_on_the_way(pair: tuple[Engine, Any], scored: Any) -> None:
    check_generation(pair[0], scored[0][2::2], scored[1][2::2])  # one batch of two rows


@pytest.mark.parametrize("pair", ["T5 1.0"], indirect=True)
def test_a_beam_search_scores_them_too(pair: tuple[Engine, Any], scored: Any) -> None:
    engine = dataclasses.replace(pair[0], settings=Decoding(max_tokens=5, beams=2))
    check_generation(engine, scored[0][1:3], scored[1][1:3])
