from typing import Any

import pytest

from promot_jax.results import spread
from promot_jax.results.schema import Comparison, Matched, Run
from promot_jax.results.scores import Draw, Icl, Target


def test_seeds_and_draws_are_told_apart() -> None:
    found = spread.over_seeds_and_draws([[40.0, 42.0], [50.0, 52.0], [45.0, 47.0]])
    assert found is not None
    assert (found.mean, found.low, found.high, found.seeds, found.draws) == (46.0, 41.0, 51.0, 3, 2)
    assert found.sd_seeds == pytest.approx(5.0)  # of 41, 51, 46
    assert found.sd_draws == pytest.approx(2**0.5)  # 1 away from each mean, one degree of freedom each
    half = 4.302653 * 5 / 3**0.5  # Student's t of two degrees of freedom at 97.5 %
    assert found.ci95 == pytest.approx([46 - half, 46 + half])


def test_one_seed_has_the_spread_of_its_draws() -> None:
    found = spread.over_seeds_and_draws([[40.0, 44.0], []])
    assert found is not None
    assert (found.mean, found.sd_seeds, found.seeds) == (42.0, None, 1)
    assert found.sd_draws == pytest.approx(8**0.5)
    found = spread.over_seeds_and_draws([[40.0, 44.0, 42.0], []])
    half = 4.302653 * 2 / 3**0.5  # Student's t of two degrees of freedom at 97.5 %
    assert found is not None and found.ci95 == pytest.approx([42 - half, 42 + half])


def test_interval_stays_among_possible_scores() -> None:
    """Student's t gave [-292.7, 342.7] of two seeds; of three far apart it reaches beyond 0 and 100."""
    two = spread.over_seeds_and_draws([[0.0], [50.0]])
    assert two is not None and two.ci95 is None and (two.low, two.high) == (0.0, 50.0)
    three = spread.over_seeds_and_draws([[0.0], [50.0], [100.0]])
    assert three is not None and three.ci95 == (0.0, 100.0)


def test_one_value_has_no_spread() -> None:
    found = spread.over_seeds_and_draws([[40.0]])
    assert found is not None
    assert (found.mean, found.ci95, found.sd_seeds, found.sd_draws) == (40.0, None, None, None)
    assert spread.over_seeds_and_draws([[], []]) is None


def test_a_draw_that_is_unlike_the_others_counts_once_per_seed() -> None:
    """Seeds weigh the same, however many draws each has."""
    found = spread.over_seeds_and_draws([[40.0], [50.0, 50.0, 50.0]])
    assert found is not None and found.mean == 45.0


def run(method: str, seed: int, icl: dict[str, Icl], target: float | None = None, **fields: Any) -> Run:
    score = Target(task="t", metric="accuracy", score=target, n=1)
    return Run(method=method, seed=seed, steps={}, target=score, icl=icl, curve=[], **fields)


def test_of_comparison() -> None:
    one = Icl(norm_avg=41.0, tasks={}, draws=[Draw(norm_avg=41.0), Draw(norm_avg=43.0)])
    two = Icl(norm_avg=44.0, tasks={})
    runs = {
        "promot": [run("promot", 0, {"1": one, "4": two}, 80.0), run("promot", 1, {"1": two})],
        "finetune": [
            run("finetune", seed, {"1": Icl(tasks={})}, score) for seed, score in enumerate((70.0, 74.0, 78.0))
        ],
        "pretrained": [run("pretrained", 0, {})],
    }
    found = spread.of_comparison(Comparison(methods=runs))
    expected = {"promot": ["target", "1", "4"], "finetune": ["target"]}
    assert {method: list(by_score) for method, by_score in found.items()} == expected
    assert found["finetune"]["target"].ci95 == pytest.approx([74 - 9.9366, 74 + 9.9366], abs=1e-3)  # 4.3027 x 4 / √3
    assert found["promot"]["target"].ci95 is None and found["promot"]["target"].mean == 80.0
    assert found["promot"]["1"].mean == 43.0 and found["promot"]["4"].mean == 44.0


def test_of_comparison_at_matched_score() -> None:
    matched = Matched(step=1, icl={"1": Icl(norm_avg=41.0, tasks={})})
    runs = {"promot": [run("promot", 0, {}, matched=matched)], "pretrained": [run("pretrained", 0, {})]}
    found = spread.of_comparison(Comparison(methods=runs), "matched")
    assert {method: by_shots["1"].mean for method, by_shots in found.items()} == {"promot": 41.0}
