"""Bootstrap intervals, the paper's normalised average, spread over seeds."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from promot_jax.errors import UserError
from promot_jax.results import bootstrap
from promot_jax.tasks import metrics

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
    samples = 100.0 * (np.random.default_rng(0).random((300, 80)) < 0.3)
    assert 0.90 <= np.mean([low <= 30 <= high for low, high in map(bootstrap.interval, samples)]) <= 0.98


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_interval_is_deterministic_ordered_and_within_the_scores(scores):
    low, high = bootstrap.interval(scores)
    assert (low, high) == bootstrap.interval(scores)
    assert min(scores) - 1e-9 <= low <= high <= max(scores) + 1e-9


def resampled(size, seed=0, resamples=bootstrap.RESAMPLES):
    """Indices of plain resamples, for references."""
    return np.random.default_rng(seed).integers(0, size, (resamples, size))


@pytest.mark.parametrize("size", [2, 20, 1000])
def test_interval_is_that_of_plain_resamples(size):
    scores = 100.0 * (np.random.default_rng(size).random(size) < 0.4)
    expected = np.quantile(scores[resampled(size)].mean(axis=1), [0.025, 0.975])
    assert bootstrap.interval(scores) == pytest.approx(tuple(expected), abs=1e-9)


def test_splits_that_do_not_fit_one_chunk_have_the_same_interval(monkeypatch):
    scores = np.random.default_rng(1).random(50)
    whole = bootstrap.interval(scores)
    monkeypatch.setattr(bootstrap, "_CHUNK", 350)  # 7 resamples at a time
    assert bootstrap.interval(scores) == whole


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("metric", ["mean", "bleu", "corpus"])
def test_equal_scores_have_an_interval_without_width(count, metric):
    outputs = ["the cat sat on the mat"] * count, ["the cat sat on a mat"] * count
    if metric == "mean":
        score, sample = 100 / 3, [100 / 3] * count
    else:
        function = {"bleu": metrics.bleu, "corpus": lambda *texts: metrics.bleu(*texts)}[metric]
        score, sample = metrics.bleu(*outputs)["bleu"], bootstrap.Outputs(*outputs, function)
    assert bootstrap.interval(sample) == pytest.approx((score, score))
    assert bootstrap.average_interval({"a": sample, "b": [score] * 3}) == pytest.approx((score, score))
    assert bootstrap.difference_interval({"a": sample}, {"a": sample}) == (0, 0)


def test_per_example_metric_gives_the_interval_of_its_scores():
    targets, predictions = list("aabbccdd"), list("aabbxxdd")
    scores = [100.0 * (t == p) for t, p in zip(targets, predictions, strict=True)]
    assert bootstrap.interval(bootstrap.Outputs(targets, predictions, Mean())) == bootstrap.interval(scores)


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


@pytest.mark.parametrize("outputs", [[], ([], [], corpus), ([], [], metrics.bleu), (["a"], [], corpus)])
def test_nothing_to_resample_is_an_error(outputs):
    with pytest.raises(ValueError, match=r"at least one example|each target needs one prediction"):
        bootstrap.interval(bootstrap.Outputs(*outputs) if outputs else [])


def test_average_interval_resamples_tasks_independently():
    scores = np.repeat([0.0, 100.0], 50)
    one_low, one_high = bootstrap.interval(scores)
    low, high = bootstrap.average_interval({str(task): scores for task in range(16)})
    # The mean over 16 independent tasks has a quarter of the spread of one.
    assert (high - low) == pytest.approx((one_high - one_low) / 4, rel=0.2)
    assert low < 50 < high


def test_average_interval_mixes_kinds_and_ignores_the_order_of_tasks():
    outputs = bootstrap.Outputs(list("ab" * 20), list("aa" * 20), corpus)
    scores = np.repeat([0.0, 100.0], [5, 15])
    forward = bootstrap.average_interval({"x": scores, "y": outputs})
    assert forward == bootstrap.average_interval({"y": outputs, "x": scores})
    assert forward[0] < 62.5 < forward[1]
    with pytest.raises(ValueError, match="at least one task"):
        bootstrap.average_interval({})


def noisy_pair(size):
    """Scores of two methods on the same examples: the second is 5 lower on each, with little noise of its own."""
    generator = np.random.default_rng(size)
    first = generator.uniform(20, 90, size)
    return first, first - 5 + generator.normal(0, 2, size)


@pytest.mark.parametrize("size", [20, 50])
def test_paired_difference_is_that_of_plain_resamples_of_pairs(size):
    first, second = noisy_pair(size)
    rows = resampled(size, seed=7, resamples=20_000)  # other resamples than ours: the same interval, up to their noise
    expected = np.quantile(first[rows].mean(axis=1) - second[rows].mean(axis=1), [0.025, 0.975])
    found = bootstrap.difference_interval({"a": first}, {"a": second})
    assert found == pytest.approx(tuple(expected), abs=0.15 * (expected[1] - expected[0]))
    assert found == bootstrap.difference_interval({"a": first}, {"a": second})
    # Neither method's own interval leaves out the other's mean, but the paired difference leaves out 0.
    assert 0 < found[0] < 5 < found[1] and bootstrap.interval(first)[0] < second.mean()


def test_paired_difference_of_averages_resamples_tasks_independently():
    first, second = noisy_pair(100)
    (low, high), (one_low, one_high) = (
        bootstrap.difference_interval(
            {str(task): first for task in range(count)}, {str(task): second for task in reversed(range(count))}
        )
        for count in (16, 1)
    )
    assert (high - low) == pytest.approx((one_high - one_low) / 4, rel=0.2)
    assert low < (first - second).mean() < high


def test_paired_difference_of_bleu_is_that_of_corpora_of_the_same_examples():
    generator = np.random.default_rng(3)
    targets = [" ".join(generator.choice(list("abcdef"), 8)) for _ in range(30)]
    better, worse = (
        [" ".join(word if generator.random() < kept else "x" for word in target.split()) for target in targets]
        for kept in (0.9, 0.8)
    )
    found = bootstrap.difference_interval(
        {"a": bootstrap.Outputs(targets, better, metrics.bleu)}, {"a": bootstrap.Outputs(targets, worse, metrics.bleu)}
    )
    differences = [
        sacrebleu.corpus_bleu([better[i] for i in row], [[targets[i] for i in row]]).score
        - sacrebleu.corpus_bleu([worse[i] for i in row], [[targets[i] for i in row]]).score
        for row in resampled(30)
    ]
    assert found == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


def test_paired_differences_need_the_same_examples():
    with pytest.raises(ValueError, match=r"same tasks twice, not \['a'\] and \['b'\]"):
        bootstrap.difference_interval({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="task 'a' has 2 examples of one method and 3 of the other"):
        bootstrap.difference_interval({"a": [1.0, 2.0]}, {"a": [1.0, 2.0, 3.0]})


def test_across_seeds_is_the_mean_with_its_range():
    assert bootstrap.across_seeds([10.0, None, 30.0, math.nan, 20.0]) == (20.0, 10.0, 30.0, 3)
    assert bootstrap.across_seeds([None]) is None


def test_the_metrics_of_the_tasks_are_understood():
    texts = (["a b", "c d"] * 10, ["a b", "c x"] * 10)
    exact = bootstrap.Outputs(*texts, metrics.exact_match)
    assert bootstrap.interval(exact) == bootstrap.interval([100.0, 0.0] * 10)


def test_bleu_is_resampled_by_its_statistics_as_corpora_would_be(monkeypatch):
    targets = ["the cat sat on the mat", "a dog sat there", ["it is so", "so it is now"], "no"] * 5
    predictions = ["the cat sat on a mat", "a dog sat here", "it is so now", ""] * 5
    monkeypatch.setattr(bootstrap, "RESAMPLES", bootstrap.CORPUS_RESAMPLES)
    anew = bootstrap.Outputs(targets, predictions, lambda *texts: metrics.bleu(*texts))
    low, high = bootstrap.interval(bootstrap.Outputs(targets, predictions, metrics.bleu))
    assert (low, high) == bootstrap.interval(anew) and 0 < low < high < 100
