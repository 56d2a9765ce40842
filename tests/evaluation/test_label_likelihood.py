"""Scoring label sets by likelihood: by hand, and in an evaluation."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks  # noqa: F401, registers

from promot_jax.checkpoints import pretrained
from promot_jax.data import examples
from promot_jax.decoding.continuous_batching import Output
from promot_jax.decoding.inputs import Engine, Input
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.evaluation import sampler as sampler_module
from promot_jax.evaluation.evaluator import Evaluator
from promot_jax.evaluation.label_likelihood import accuracies, likeliest
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.evaluation.settings import Evaluation

SETTINGS = Evaluation(max_input_length=256, tokens_per_batch=512, likelihood=True, decoding=Decoding(max_tokens=4))


def test_the_greatest_sum_and_the_greatest_per_character() -> None:
    scores = {"no": -3.0, "entailment": -10.0, "maybe": -10.0}
    assert likeliest(scores) == "no" and likeliest(scores, normalized=True) == "entailment"
    assert likeliest({"b": -1.0, "a": -1.0}) == "b"  # the first of equals
    assert accuracies([(scores, "no"), (scores, "entailment"), (scores, "no"), (scores, "maybe")]) == {
        "acc": 50, "acc_norm": 25
    }  # fmt: skip
    assert accuracies([({}, "no")]) == {}


@pytest.fixture(name="sampler", scope="module")
def _sampler(tiny_folder: Path) -> Sampler:
    return Sampler(pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner()), SETTINGS, Partitioner())


def test_an_evaluation_scores_tasks_with_a_label_set(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Input] = []

    def score(engine: Engine, inputs: Sequence[Input]) -> Iterator[Output]:
        """The longer a label is, the less likely it is."""
        seen.extend(inputs)
        for index, each in enumerate(inputs):
            scores = np.array([-len(ids) for ids in each.continuations], np.float32)
            yield Output(index, np.full(4, -1), scores if each.continuations else None)

    monkeypatch.setattr(sampler_module, "generate_all", score)
    judge, params = Evaluator(sampler, task="tiny_review", icl="tiny_icl"), {"model": sampler.base.params}
    icl, rows = judge.icl(params, 1, "test", 8)
    sizes = [example.targets.strip() for example in examples.read("tiny_size", "test", limit=8)]
    assert icl.tasks["tiny_size"].acc == pytest.approx(100 * sizes.count("big") / 8) == icl.acc
    assert icl.tasks["tiny_colour"].acc is None and icl.tasks["tiny_size"].acc_norm is not None
    by_task = {name: [row.likelihoods for row in rows if row.task == name] for name in icl.tasks}
    assert all(each.keys() == {"big", "small"} for each in by_task["tiny_size"]) and not any(by_task["tiny_colour"])
    vocabulary = sampler.base.vocabulary
    assert {vocabulary.decode(ids) for each in seen for ids in each.continuations} == {" big", " small"}
    assert judge.target(params, "test", 4).entry.acc is not None


def test_labels_given_the_prompt(sampler: Sampler) -> None:
    """Of the model itself: the likelihoods of one-token labels are probabilities of the next token."""
    labels = ("good", "bad")
    requests = [Request(f"Review: {text}\nLabel:", labels=labels) for text in ("film 1 was good", "cast 2 was bad")]
    params = {"model": sampler.base.params}
    found = sorted(sampler.stream(params, requests))
    assert [each.likelihoods.keys() == {*labels} and max(each.likelihoods.values()) < 0 for each in found] == [True] * 2
    assert max(np.exp([*each.likelihoods.values()]).sum() for each in found) < 1
    small = dataclasses.replace(SETTINGS, tokens_per_batch=1)
    for each, alone in zip(
        found, sorted(Sampler(sampler.base, small, Partitioner()).stream(params, requests)), strict=True
    ):
        assert alone.likelihoods == pytest.approx(each.likelihoods, rel=1e-4) and alone.text == each.text
