"""Bootstrap intervals, the paper's normalised average, spread over seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promot_jax.errors import UserError
from promot_jax.results import bootstrap

# Per-task rows of the paper's main table (mT5 XXL fine-tuned on RTE), 1-shot and 4-shot:
# CB, WiC, TriviaQA, WebQuestions, WMT16 En-De, WMT16 En-Ro, XSum, WikiLingua/en.
PAPER = {
    "pretrained": (
        ([46.43, 49.69, 17.58, 9.70, 3.97, 1.82, 6.41, 4.59], 17.52),
        ([51.79, 49.69, 19.02, 13.04, 8.83, 3.92, 2.35, 1.33], 18.75),
    ),
    "finetune": (
        ([73.21, 50.00, 0.15, 0.05, 0, 0, 0, 0], 15.43),
        ([82.14, 50.16, 0.11, 0.05, 0, 0, 0, 0], 16.56),
    ),
    "promot": (
        ([66.07, 51.41, 17.64, 11.07, 2.02, 0.70, 7.02, 4.84], 20.10),
        ([67.86, 53.61, 18.66, 13.19, 3.69, 0.96, 7.01, 4.90], 21.24),
    ),
    "promot_1shot": (
        ([83.93, 51.25, 17.82, 10.14, 2.26, 0.87, 6.94, 4.87], 22.26),
        ([82.14, 50.63, 19.62, 12.11, 4.89, 1.87, 3.93, 3.43], 22.33),
    ),
}


class Mean:
    """A metric that is a mean over examples."""

    @staticmethod
    def per_example(target, prediction):
        """100 where they agree."""
        return 100.0 * (target == prediction)

    def __call__(self, targets, predictions):
        """Accuracy."""
        return {"accuracy": float(np.mean([self.per_example(t, p) for t, p in zip(targets, predictions, strict=True)]))}


def corpus(targets, predictions):
    """The same number as a corpus metric, with a second key that must not count."""
    return {"accuracy": Mean()(targets, predictions)["accuracy"], "other": -1.0}


@pytest.mark.parametrize("method", PAPER)
@pytest.mark.parametrize("shots", [0, 1])
def test_normalized_average_reproduces_the_paper(method, shots):
    rows, average = PAPER[method][shots]
    computed = bootstrap.normalized_average({str(index): score for index, score in enumerate(rows)})
    assert abs(computed - average) <= 0.0051  # the rows are themselves rounded to two digits


@pytest.mark.parametrize("scores", [{}, {"a": 101.0}, {"a": 50.0, "b": -0.1}, {"a": math.nan}])
def test_normalized_average_refuses_what_is_not_a_score(scores):
    with pytest.raises(UserError):
        bootstrap.normalized_average(scores)


def test_interval_is_close_to_the_normal_approximation():
    scores = np.repeat([0.0, 100.0], [120, 280])
    low, high = bootstrap.interval(scores)
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert low == pytest.approx(70 - half, abs=1.0)
    assert high == pytest.approx(70 + half, abs=1.0)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = 100.0 * (generator.random((300, 80)) < 0.3)
    intervals = [bootstrap.interval(sample, resamples=300, seed=index) for index, sample in enumerate(samples)]
    assert 0.90 <= np.mean([low <= 30 <= high for low, high in intervals]) <= 0.98


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.floats(0, 100), min_size=1, max_size=30),
    seed=st.integers(0, 2**32 - 1),
    level=st.floats(0.5, 0.99),
)
def test_interval_is_deterministic_ordered_and_within_the_scores(scores, seed, level):
    low, high = bootstrap.interval(scores, seed=seed, level=level, resamples=50)
    assert (low, high) == bootstrap.interval(scores, seed=seed, level=level, resamples=50)
    assert min(scores) - 1e-9 <= low <= high <= max(scores) + 1e-9


def test_another_seed_gives_other_draws():
    scores = np.random.default_rng(1).random(50)
    assert not np.array_equal(bootstrap.draws(scores, seed=0), bootstrap.draws(scores, seed=1))


def test_chunks_do_not_change_how_many_draws_there_are(monkeypatch):
    scores = np.random.default_rng(1).random(50)
    monkeypatch.setattr(bootstrap, "_CHUNK", 350)  # 7 resamplings at a time
    assert bootstrap.draws(scores, resamples=100).shape == (100,)


def test_per_example_metric_gives_the_interval_of_its_scores():
    targets, predictions = list("aabbccdd"), list("aabbxxdd")
    scores = [100.0 * (t == p) for t, p in zip(targets, predictions, strict=True)]
    assert bootstrap.interval((targets, predictions, Mean())) == bootstrap.interval(scores)


def test_corpus_metric_is_recomputed_on_resampled_pairs():
    targets, predictions = list("ab" * 40), list("aa" * 40)
    sizes = []

    def spying(resampled_targets, resampled_predictions):
        sizes.append(len(resampled_targets))
        assert set(zip(resampled_targets, resampled_predictions, strict=True)) <= {("a", "a"), ("b", "a")}
        return corpus(resampled_targets, resampled_predictions)

    low, high = bootstrap.interval(bootstrap.Outputs(targets, predictions, spying))
    assert sizes == [80] * bootstrap.CORPUS_RESAMPLES
    assert 35 < low < 50 < high < 65


def test_three_scores_in_a_tuple_are_scores():
    assert bootstrap.interval((50.0, 50.0, 50.0)) == (50.0, 50.0)


@pytest.mark.parametrize("sample", [[], ([], [], corpus), (["a"], [], corpus)])
def test_nothing_to_resample_is_an_error(sample):
    with pytest.raises(ValueError, match=r"at least one example|one prediction for each target"):
        bootstrap.interval(sample)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_is_a_fraction(level):
    with pytest.raises(ValueError, match="level"):
        bootstrap.interval([1.0, 2.0], level=level)


def test_average_interval_resamples_tasks_independently():
    scores = np.repeat([0.0, 100.0], 50)
    one_low, one_high = bootstrap.interval(scores)
    low, high = bootstrap.average_interval({str(task): scores for task in range(16)})
    # The mean over 16 independent tasks has a quarter of the spread of one.
    assert (high - low) == pytest.approx((one_high - one_low) / 4, rel=0.2)
    assert low < 50 < high


def test_average_interval_mixes_kinds_and_ignores_the_order_of_tasks():
    outputs = (list("ab" * 20), list("aa" * 20), corpus)
    scores = np.repeat([0.0, 100.0], [5, 15])
    forward = bootstrap.average_interval({"x": scores, "y": outputs})
    assert forward == bootstrap.average_interval({"y": outputs, "x": scores})
    assert forward[0] < 62.5 < forward[1]
    with pytest.raises(ValueError, match="at least one task"):
        bootstrap.average_interval({})


def test_across_seeds_range_and_t_interval():
    assert bootstrap.across_seeds([10.0, None, 30.0, math.nan, 20.0]) == (20.0, 10.0, 30.0, 3)
    spread = bootstrap.across_seeds([10.0, 20.0, 30.0], kind="t")
    half = 4.302653 * 10 / math.sqrt(3)  # the t quantile of 2 degrees of freedom
    assert spread == pytest.approx((20.0, 20 - half, 20 + half, 3), rel=1e-5)
    assert bootstrap.across_seeds([None]) is None
    assert bootstrap.across_seeds([7.0], kind="t") == (7.0, -math.inf, math.inf, 1)


def test_the_metrics_of_the_tasks_are_understood():
    metrics = pytest.importorskip("promot_jax.tasks.metrics")
    outputs = (["a b", "c d"] * 10, ["a b", "c x"] * 10)
    assert bootstrap.interval((*outputs, metrics.exact_match)) == bootstrap.interval([100.0, 0.0] * 10)
    low, high = bootstrap.interval((*outputs, metrics.bleu), resamples=20)
    assert 0 <= low <= high <= 100
