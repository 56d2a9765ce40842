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
from promot_jax.decoding.continuous_batching import Engine, Input
from promot_jax.decoding.likelihood import log_likelihoods
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
    stops, key = np.zeros(model.config.vocab_size, bool), jax.random.key(0)
    return Engine(model, Decoding(), loaded.placed.params, None, stops, key, Partitioner(), 256, 1024), theirs


def by_torch(model: Any, ids: list[int], continuation: list[int], continues: bool) -> float:
    if continues:
        logits = model(input_ids=torch.tensor([ids + continuation])).logits[0, len(ids) - 1 : -1]
    else:
        start = torch.tensor([[0, *continuation[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0]
    return float(torch.log_softmax(logits, -1)[range(len(continuation)), continuation].sum())


def test_sums_of_log_probabilities(pair: tuple[Engine, Any]) -> None:
    engine, theirs = pair
    noise = np.random.default_rng(0)
    start = noise.integers(2, 250, 34).tolist()
    inputs = [Input([*start, *noise.integers(2, 250, size).tolist()], 0) for size in (1, 4, 9, 20, 2)]
    continuations = [
        [noise.integers(2, 250, length).tolist() for length in lengths]
        for lengths in ((1, 1), (2, 3, 1), (1, 4), (1, 2, 3), (3, 3))
    ]
    with torch.no_grad():
        want = [
            [by_torch(theirs, each.ids, ids, engine.model.continues) for ids in own]
            for each, own in zip(inputs, continuations, strict=True)
        ]
    for group in ("", "a"):  # with the prefix that they share processed once, too
        grouped = [dataclasses.replace(each, group=group) for each in inputs]
        found = dict(log_likelihoods(engine, grouped, continuations))
        assert len(found) == len(inputs)
        for index, scores in found.items():
            np.testing.assert_allclose(scores, want[index], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # what is given, such as a sentinel, is not scored
        first = [by_torch(theirs, inputs[2].ids, ids[:1], engine.model.continues) for ids in continuations[2]]
    (rest,) = [scores for _, scores in log_likelihoods(engine, inputs[2:3], continuations[2:3], [1])]
    np.testing.assert_allclose(rest, np.subtract(want[2], first), rtol=1e-4, atol=1e-4)
