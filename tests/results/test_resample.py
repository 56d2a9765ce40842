"""Resamples of evaluations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.results import resample
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.schema import Comparison
from promot_jax.tasks import metrics


def scored(scores: str | list[float], examples: str = "x", **fields: object) -> ExampleScores:
    return ExampleScores(metric="m", examples=examples, prompts="", scores=scores, **fields)


def test_the_first_is_the_evaluation_as_it_is() -> None:
    values = resample.of_task("a", scored("0111"))
    assert values is not None and values.shape == (1 + resample.RESAMPLES,)
    assert values[0] == 75 and values[1:].mean() == pytest.approx(75, abs=2) and set(values) <= {0, 25, 50, 75, 100}
    number = resample.of_task("a", scored([0.0, 100.0, 100.0, 100.0]))
    np.testing.assert_allclose(values, number)


def test_equal_examples_are_drawn_alike_and_others_independently() -> None:
    first, again, opposite, other, of_task = (
        resample.of_task(task, scored(digits * 50, examples))
        for task, digits, examples in (
            ("a", "01", "x"), ("a", "01", "x"), ("a", "10", "x"), ("a", "01", "y"), ("b", "01", "x")
        )
    )  # fmt: skip
    assert first is not None and opposite is not None and other is not None and of_task is not None
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first + opposite, 100)
    for independent in (other, of_task):
        assert abs(np.corrcoef(first, independent)[0, 1]) < 0.1


def test_draws_of_exemplars_are_averaged_and_shots_kept_apart() -> None:
    tasks = {"icl_1shot": "1100", "icl_1shot/draw_1": "1111", "icl_4shot": "0000"}
    found = {name: {"a": scored(digits)} for name, digits in tasks.items()}
    assert {shots: resample.of_icl(found, shots)["a"][0] for shots in ("1", "4")} == {"1": 75, "4": 0}
    assert resample.of_icl(found, 2) == {} and resample.of_target(found) == {}


sums = st.tuples(*[st.integers(0, 30)] * 8, st.integers(0, 60), st.integers(1, 60))


@given(st.lists(sums, min_size=1, max_size=5))
def test_bleu_is_that_of_sacrebleu(rows: list[tuple[int, ...]]) -> None:
    """No more n-grams match than there are, and an output without words has none."""
    table = np.array([[*np.minimum(row[:4], row[4:8]), *row[4:]] for row in rows])
    table[:, 8] = np.where(table[:, 4:8].any(axis=1), np.maximum(table[:, 8], 1), table[:, 8])
    wanted = [metrics.bleu.of_sums(row) for row in table]
    np.testing.assert_allclose(resample.bleu(table.astype(float)), wanted, atol=1e-9)


def test_bleu_of_resamples_is_that_of_corpora() -> None:
    targets = ["the cat sat on the mat", "a dog sat there today", "it is so"] * 4
    outputs = ["the cat sat on a mat", "a dog sat there", "it was so"] * 4
    table = [metrics.bleu.statistics(*pair) for pair in zip(targets, outputs, strict=True)]
    values = resample.of_task("a", ExampleScores(metric="bleu", examples="", prompts="", statistics=table))
    assert values is not None and values[0] == pytest.approx(metrics.bleu(targets, outputs)["bleu"])
    assert len(set(values)) > 50
    assert resample.of_task("a", ExampleScores(metric="mine", examples="", prompts="", statistics=table)) is None


def test_seeds_are_drawn_with_the_variance_of_their_mean() -> None:
    values = np.repeat([[40.0], [50.0], [54.0], [60.0]], 1 + resample.RESAMPLES, axis=1)
    found = resample.over_seeds(values)
    assert found[0] == 51
    assert found[1:].std() == pytest.approx(values[:, 0].std(ddof=1) / 2, rel=0.05)
    np.testing.assert_allclose(resample.over_seeds(values[:1]), 40)


def test_a_comparison_is_computed_once_however_often_reports_ask() -> None:
    asked: list[str] = []

    @resample.remembered
    def count(results: Comparison, checkpoint: str = "best") -> int:
        asked.append(checkpoint)
        return len(asked)

    one, equal = Comparison(methods={}), Comparison(methods={})
    assert [count(one), count(one), count(one, "matched"), count(equal), count(one)] == [1, 1, 2, 3, 1]
    for _ in range(resample.REMEMBERED):
        count(Comparison(methods={}))
    assert count(one) == len(asked)  # forgotten since


def test_few_seeds_have_students_interval_where_they_make_the_variance() -> None:
    seeds = np.array([[40.0], [50.0], [54.0], [60.0]])
    values = np.repeat(seeds, 1 + resample.RESAMPLES, axis=1)
    low, high = resample.interval(resample.over_seeds(values), resample.alone(values), 4)
    half = 3.182 * seeds.std(ddof=1) / 2  # of three degrees of freedom
    assert (low, high) == pytest.approx((51 - half, 51 + half), abs=0.2 * half)
    noise = np.random.default_rng(0).normal(0, 10, 1 + resample.RESAMPLES)
    noise[0] = 0
    moved = values + noise  # by examples, much more than by seeds
    low, high = resample.interval(resample.over_seeds(moved), resample.alone(moved), 4, least=-100)
    assert high - low == pytest.approx(2 * 1.96 * np.hypot(10, seeds.std(ddof=1) / 2), rel=0.1)


def test_intervals_end_at_possible_scores_and_can_be_centred() -> None:
    values = np.array([1.0, *np.linspace(-30, 30, resample.RESAMPLES)])
    assert resample.interval(values, values, 1) == pytest.approx((0, 28.5))
    assert resample.interval(values, values, 1, least=-100) == pytest.approx((-28.5, 28.5))
    assert resample.interval(values, values, 1, least=-100, centred=True) == pytest.approx((-27.5, 29.5))
