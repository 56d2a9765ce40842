"""The lengths of a run, from its data or given, and what is said of them before a model is loaded."""

import dataclasses
from typing import Any

import pytest
import tiny
import tiny_tasks  # noqa: F401, registers

from promot_jax.checkpoints.answers import Answers
from promot_jax.checkpoints.pretrained import ModelText
from promot_jax.data.files import DataFile
from promot_jax.data.lengths import measure
from promot_jax.errors import UserError
from promot_jax.experiments import settings
from promot_jax.experiments.data_check import report, with_lengths
from promot_jax.experiments.settings import Experiment

TEXT = ModelText(tiny.vocabulary(), True, Answers())
EXPERIMENT = Experiment("m", "tiny_review", (), None, "tiny_icl")


def longest(task: str) -> dict[str, int]:
    found = [measure(task, split, TEXT.vocabulary, True).longest for split in ("train", "validation")]
    return {key: max(lengths[key] for lengths in found) for key in ("inputs", "targets")}


@pytest.mark.parametrize(
    ("given", "task", "wanted"),
    [
        ({"inputs": 9, "targets": 2}, "tiny_review", {"inputs": 9, "targets": 2}),
        ({"inputs": 9, "targets": 2}, "tiny_review_1shot", {"inputs": 9, "targets": 2}),
        ({"tiny_review": {"inputs": 9, "targets": 2}}, "tiny_review", {"inputs": 9, "targets": 2}),
        ({"tiny_review": {"inputs": 9, "targets": 2}}, "tiny_review_2shot", {"inputs": 31, "targets": 2}),
        ({"tiny_review": {"inputs": 9, "targets": 2}}, "tiny_size", None),
        (None, "tiny_review", None),
    ],
)
def test_lengths_given_or_of_the_data(given: Any, task: str, wanted: dict[str, int] | None) -> None:
    experiment = dataclasses.replace(EXPERIMENT, task=task, feature_lengths=given)
    assert with_lengths(experiment, TEXT).lengths == (wanted or longest(task))
    if wanted is None:
        with pytest.raises(UserError, match="set TASK_FEATURE_LENGTHS"):
            _ = experiment.lengths


def test_lengths_of_a_mixture_and_of_exemplars() -> None:
    one, other = longest("tiny_review"), longest("tiny_size")
    mixture = with_lengths(dataclasses.replace(EXPERIMENT, task="tiny_pair"), TEXT)
    assert mixture.lengths == {key: max(one[key], other[key]) for key in one}
    shots = with_lengths(EXPERIMENT.with_shots(1), TEXT)
    assert shots.task == "tiny_review_1shot"
    assert shots.lengths == {"inputs": 2 * one["inputs"] + one["targets"], "targets": one["targets"]}


def test_very_long_inputs_make_no_longer_rows_than_an_evaluation_takes() -> None:
    short = dataclasses.replace(EXPERIMENT.evaluation, max_input_length=20)
    assert with_lengths(dataclasses.replace(EXPERIMENT, evaluation=short), TEXT).lengths["inputs"] == 20


@pytest.mark.parametrize("given", [{}, {"inputs": 9}, {"inputs": 9, "targets": 0}, {"a": {"inputs": 9}}, {"a": 3}])
def test_lengths_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match="TASK_FEATURE_LENGTHS is"):
        dataclasses.replace(EXPERIMENT, feature_lengths=given)


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    decoding = dataclasses.replace(EXPERIMENT.evaluation.decoding, max_tokens=1)
    evaluation = dataclasses.replace(EXPERIMENT.evaluation, decoding=decoding)
    report(with_lengths(dataclasses.replace(EXPERIMENT, evaluation=evaluation), TEXT), TEXT)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[:4]] == [
        "Task 'tiny_review', in tokens of m",
        "train",
        "validation",
        "test",
    ]
    assert lines[1].startswith("  train: 24 rows ('bad' ") and lines[4].endswith("no training row is left out.")
    assert lines[5].startswith("  Warning: 24 targets are longer than outputs can be (Decoding.max_tokens = 1); --gin.")


def test_what_is_left_out_is_said_by_class(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure("tiny_review", "train", TEXT.vocabulary, True).rows
    limits = {"inputs": sorted(row.inputs for row in rows)[len(rows) // 2], "targets": 3}
    longer = [row.label for row in rows if row.inputs > limits["inputs"]]
    report(dataclasses.replace(EXPERIMENT, feature_lengths=limits), TEXT)
    line = capsys.readouterr().out.splitlines()[4]
    assert f"{len(longer)} of 24 training rows are longer and left out (" in line
    for label in set(longer):
        assert f"{label!r} {longer.count(label)} of {[row.label for row in rows].count(label)}" in line


def test_a_users_data_are_the_task() -> None:
    """And nothing in their place; a number of shots stays."""
    given: dict[str, Any] = {"checkpoint": "m", "modules": (), "feature_lengths": None, "icl_mixture": ""}
    for task, data, wanted in (
        ("movie_sentiment", DataFile("a/reviews.csv"), "reviews"),
        ("reviews_1shot", DataFile("a/reviews.csv"), "reviews_1shot"),
        ("movie_sentiment", DataFile(), "movie_sentiment"),
    ):
        found = settings.experiment(task=task, data=data, **given)
        assert found.task == wanted and (found.data is None) == (not data.path)
