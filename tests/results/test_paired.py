"""Paired differences. No number here was measured."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from promot_jax.results import paired, resample
from promot_jax.results.comparison import comparison
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.paired import AVERAGE, TARGET, Difference
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Icl, Score, Target


def scores(values: Any, examples: str = "x", prompts: str = "p") -> ExampleScores:
    return ExampleScores(metric="m", examples=examples, prompts=prompts, scores=[*map(float, values)])


def run(method: str, seed: int, target: Any = None, **tasks: Any) -> Run:
    """A run with scores of examples; tasks at one shot, each of scores or `ExampleScores`."""
    known = {name: one if isinstance(one, ExampleScores) else scores(one) for name, one in tasks.items()}
    named = {name: Score(metric="m", score=50.0, n=one.size) for name, one in known.items()}
    evaluated = {"icl_1shot": known} | ({} if target is None else {"target": {"t": scores(target)}})
    fine_tuned = Target(task="t", metric="m", score=50.0, n=1)
    icl = {"1": Icl.of(named)} if named else {}
    return Run(method=method, seed=seed, steps={}, target=fine_tuned, icl=icl, curve=[], example_scores=evaluated)


def found(results: Comparison) -> dict[tuple[str, str, str], Difference]:
    return {(one.first, one.second, one.score): one for one in paired.differences(results)}


def drawn(seeds: int, examples: int, rng: np.random.Generator, *sds: float) -> np.ndarray:
    """Scores `[seeds, examples]` around 50: deviations of seeds, of examples, and of both together."""
    shapes = (seeds, 1), (1, examples), (seeds, examples)
    return 50 + sum(sd * rng.normal(size=shape) for sd, shape in zip(sds, shapes, strict=True))


def test_all_methods_against_fine_tuning_and_promot_against_all() -> None:
    pairs = paired.pairs(["pretrained", "finetune", "kl", "promot", "l2sp"])
    against = [(name, "finetune") for name in ("promot", "kl", "l2sp", "pretrained")]
    assert pairs == [*against, *(("promot", name) for name in ("kl", "l2sp", "pretrained"))]
    assert paired.pairs(["kl", "promot"]) == [("promot", "kl")] and paired.pairs(["kl"]) == []


def test_differences_are_those_of_plain_resamples() -> None:
    """The reference draws its own resamples: the intervals agree up to their noise."""
    rng = np.random.default_rng(0)
    one, two = drawn(5, 60, rng, 2, 8, 2), drawn(5, 60, rng, 2, 8, 2) - 4
    runs = [run(name, seed, a=of[seed]) for name, of in (("promot", one), ("finetune", two)) for seed in range(5)]
    difference = found(comparison(runs))["promot", "finetune", "a"]

    resampled = []
    for _ in range(4000):
        seeds, examples = rng.integers(0, 5, 4), rng.integers(0, 60, 60)
        resampled.append((one - two)[np.ix_(seeds, examples)].mean())
    ends = np.quantile(resampled, [0.025, 0.975])
    mean, of_seeds = (one - two).mean(), (one - two).mean(axis=1).var(ddof=1) / 5
    student = stats.t.ppf(0.975, 4 * (np.var(resampled) / of_seeds) ** 2) / 1.96
    low, high = mean + (ends - mean) * student
    assert difference.mean == pytest.approx(mean, abs=1e-3) and 1.02 < student < 1.4
    assert difference.ci95 == pytest.approx((low, high), abs=0.1 * (high - low))
    assert (difference.seeds, difference.examples, difference.shots) == (5, 60, "1")


def test_what_makes_an_example_hard_for_both_cancels() -> None:
    hard = drawn(1, 100, np.random.default_rng(1), 0, 15, 0)[0]
    difference = found(comparison([run("promot", 0, a=hard + 1), run("finetune", 0, a=hard)]))[
        "promot", "finetune", "a"
    ]
    assert difference.mean == pytest.approx(1) and difference.ci95 == pytest.approx((1, 1)) and difference.clear


@pytest.mark.parametrize(
    ("seeds", "sds", "least"),
    [
        (1, (0, 20, 5), 0.90),  # one seed: over examples only
        (5, (0, 15, 5), 0.90),  # examples that are hard under every seed
        (5, (3, 10, 10), 0.92),
        (3, (4, 0, 1), 0.90),  # seeds that differ, where examples do not
        (5, (4, 0, 1), 0.90),
    ],
)
def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    seeds: int, sds: tuple[float, ...], least: float
) -> None:
    rng, hits = np.random.default_rng(3), 0
    zero = [run("finetune", seed, a=[0.0] * 60) for seed in range(seeds)]
    for _ in range(150):
        values = drawn(seeds, 60, rng, *sds).clip(0, 100)
        runs = [run("promot", seed, a=values[seed]) for seed in range(seeds)]
        low, high = found(comparison([*runs, *zero]))["promot", "finetune", "a"].ci95
        hits += low <= 50 <= high
    assert least <= hits / 150 < 1


def test_one_seed_has_an_interval_over_its_examples() -> None:
    values = 100.0 * (np.random.default_rng(4).random(400) < 0.3)
    difference = found(comparison([run("promot", 0, a=values), run("finetune", 0, a=0 * values)]))[
        "promot", "finetune", "a"
    ]
    half = 1.96 * values.std() / 20
    assert difference.seeds == 1
    assert difference.ci95 == pytest.approx((values.mean() - half, values.mean() + half), abs=1)


def test_the_average_weighs_tasks_alike_and_the_target_has_a_difference_of_its_own() -> None:
    runs = [
        run("promot", 0, target=[100.0, 0.0], a=[100.0, 100.0], b=[50.0] * 8),
        run("finetune", 0, target=[0.0, 0.0], a=[0.0, 0.0], b=[50.0] * 8),
    ]
    differences = found(comparison(runs))
    means = {score: one.mean for (_, _, score), one in differences.items()}
    assert means == {TARGET: 50, "a": 100, "b": 0, AVERAGE: 50}
    assert (differences["promot", "finetune", AVERAGE].examples, differences["promot", "finetune", TARGET].shots) == (
        10, None
    )  # fmt: skip


def test_what_cannot_be_paired_is_left_out() -> None:
    """Other examples, other exemplars, other seeds, a task without scores of examples, or older results."""
    whole = run("promot", 0, target=[1.0], a=[1.0], b=[1.0], c=[1.0])
    other = run("finetune", 0, a=scores([1.0], examples="y"), b=scores([1.0], prompts="q"), c=[2.0])
    differences = found(comparison([whole, other]))
    assert list(differences) == [("promot", "finetune", "c")]
    assert found(comparison([whole, run("finetune", 1, target=[1.0], a=[1.0])])) == {}
    older = Run(method="finetune", seed=0, steps={}, target=whole.target, icl=whole.icl, curve=[])
    assert found(comparison([whole, older])) == {}


def test_the_target_is_paired_however_its_prompts_are_written() -> None:
    """A method may put a hard prompt or exemplars before it: the examples are the same."""
    one, two = run("promot", 0, target=[100.0]), run("finetune", 0)
    evaluated = {"target": {"t": scores([0.0], prompts="another")}}
    two = Run(method="finetune", seed=0, steps={}, target=two.target, icl={}, curve=[], example_scores=evaluated)
    assert found(comparison([one, two]))["promot", "finetune", TARGET].mean == 100


def test_equal_results_have_equal_intervals() -> None:
    values = np.random.default_rng(5).uniform(0, 100, (3, 20))
    runs = [run(name, n, a=values[n] * part) for name, part in (("promot", 1), ("finetune", 0.5)) for n in range(3)]
    first = paired.differences(comparison(runs))
    resample._counts.cache_clear()
    assert paired.differences(comparison(reversed(runs)))[0].ci95 == first[0].ci95
