"""Frontiers of target score and ICL. No number here was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.results import frontier
from promot_jax.results.comparison import comparison
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.frontier import Frontier, Scores
from promot_jax.results.records import replace
from promot_jax.results.schema import Candidate, Comparison, Run, Selection
from promot_jax.results.scores import Icl, Score, StepEvaluation, Target, Tested

STAGES = {"promot": "stage2", "wise_ft": "wise_ft"}
scores = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8)


def point(step: int, target: float | None, icl: float | None, **fields: Any) -> StepEvaluation:
    return StepEvaluation(**{"step": step, "stage": "finetune", "target": target, "icl": icl} | fields)


def run(method: str, seed: int, *points: tuple[float | None, float | None], **fields: Any) -> Run:
    """A run with points of (target, ICL) from step 0 on."""
    stage = STAGES.get(method, "finetune")
    curve = [point(10 * n, *scores, stage=stage) for n, scores in enumerate(points)]
    return Run(method=method, seed=seed, steps={}, target=None, icl={}, curve=curve, **fields)


def found(*runs: Run, others: Sequence[Run] = (), **fields: Any) -> dict[str, Frontier]:
    results = replace(comparison(runs), others=[*others], **fields)
    return {one.method: one for one in frontier.frontiers(results)}


def pair(scores: Scores) -> tuple[float, float]:
    return scores.target, scores.icl


@given(scores)
def test_the_area_is_the_share_of_cells_below_a_point(points: list[tuple[int, int]]) -> None:
    """Of a grid of 20 x 20, scores in steps of 5; the reference at a target score of 25."""
    targets, icls = np.array(points).T
    grid = [(x, y) for x in range(5, 20) for y in range(20)]  # lower left corners
    covered = sum(any(x < t and y < i for t, i in points) for x, y in grid)
    area = frontier.area(5.0 * targets, 5.0 * icls, 25.0)
    assert area == pytest.approx(100 * covered / len(grid))
    twice = frontier.area(np.stack([5.0 * targets] * 2), np.stack([5.0 * icls] * 2), 25.0)
    assert twice == pytest.approx([area, area])


@given(scores)
def test_a_point_is_on_the_frontier_where_none_is_better(points: list[tuple[int, int]]) -> None:
    kept = frontier.non_dominated(*np.array(points).T)
    for (target, icl), on in zip(points, kept, strict=True):
        better = [(t, i) for t, i in points if t >= target and i >= icl and (t, i) != (target, icl)]
        assert on == (not better)


def test_points_are_those_of_all_settings_after_the_first_update() -> None:
    chosen = run("promot", 0, (99, 99), (60, 40), (80, 30))
    other = run("promot", 0, (99, 99), (70, 50), (None, 60), varied={"learning_rate": 0.1})
    selection = {"promot": Selection(chosen={"learning_rate": 0.5}, candidates=[Candidate(varied={}, seeds={})])}
    promot = found(chosen, run("pretrained", 0), others=[other], selection=selection)["promot"]
    assert [(p.varied["learning_rate"], p.step, *pair(p.validation), p.on_frontier) for p in promot.points] == [
        (0.5, 20, 80, 30, True),
        (0.1, 10, 70, 50, True),
        (0.5, 10, 60, 40, False),
    ]
    assert promot.validation.percent == pytest.approx(
        (70 * 50 + 10 * 30) / 100
    )  # ProMoT's step 0 is not the pretrained model
    assert (promot.seeds, promot.validation.over, promot.validation.ci95, promot.test) == (1, "", None, None)


def test_the_reference_is_where_fine_tuning_began() -> None:
    results = comparison([run("finetune", 0, (20, 55), (70, 10)), run("promot", 0, (90, 55), (60, 50))])
    assert frontier.reference(results) == (20, 55)
    assert frontier.reference(comparison([run("promot", 0, (90, 55))])) == (0, None)
    areas = {one.method: one for one in frontier.frontiers(results)}
    assert areas["finetune"].validation.percent == pytest.approx(50 * 10 / 80)
    assert areas["promot"].validation.change == pytest.approx(40 * 50 / 80 - 50 * 10 / 80)


def test_alphas_are_points() -> None:
    mixed = run("wise_ft", 0)
    curve = [point(step, step, 50 - step / 4, stage="wise_ft", alpha=step / 100) for step in (0, 50, 100)]
    (wise,) = found(replace(mixed, curve=curve)).values()
    assert [(p.alpha, p.on_frontier) for p in wise.points] == [(1.0, True), (0.5, True)]


def test_scores_are_means_over_seeds_and_points_that_some_seed_lacks_are_left_out() -> None:
    runs = [run("finetune", seed, (0, 0), (60 + seed, 40 - seed), *[(90, 90)] * (seed == 2)) for seed in range(3)]
    (one,) = found(*runs).values()
    assert [(p.step, *pair(p.validation)) for p in one.points] == [(10, pytest.approx(61), pytest.approx(39))]
    assert (one.seeds, one.left_out, one.validation.over) == (3, 1, "seeds")


def test_the_interval_over_seeds_is_that_of_their_spread_around_the_area() -> None:
    """With one point per seed and a fixed target score the area is a mean: Student's interval is its reference."""
    icls = [30.0, 36.0, 33.0, 40.0, 31.0, 35.0, 38.0, 29.0]
    (whole,) = found(*[run("finetune", seed, (0, 0), (50, icl)) for seed, icl in enumerate(icls)]).values()
    one = whole.validation
    assert one.percent == pytest.approx(np.mean(icls) / 2) and one.ci95
    half = 2.365 * np.std(icls, ddof=1) / len(icls) ** 0.5 / 2  # of seven degrees of freedom
    assert one.ci95 == pytest.approx((one.percent - half, one.percent + half), abs=0.15 * half)


def with_examples(method: str, seed: int, target: np.ndarray, icl: np.ndarray) -> Run:
    """A run of one point per row of scores of examples, 100 or 0."""
    curve = [point(0, 0.0, 0.0, stage=STAGES.get(method, "finetune"))]
    for n, (of_target, of_icl) in enumerate(zip(target, icl, strict=True), 1):
        named = {"target": {"t": of_target}, "icl_1shot": {"a": of_icl}}
        evaluated = {
            name: {task: ExampleScores(metric="m", examples=name, prompts="", scores=[*values])}
            for name, tasks in named.items()
            for task, values in tasks.items()
        }
        tasks = {"a": Score(metric="m", score=of_icl.mean(), n=len(of_icl))}
        fields = {"tasks": tasks, "example_scores": evaluated, "stage": curve[0].stage}
        curve.append(point(n, of_target.mean(), of_icl.mean(), **fields))
    return replace(run(method, seed, settings={"curve_shots": 1}), curve=curve)


def answers(rng: np.random.Generator, *shares: float, size: int = 80) -> np.ndarray:
    """Scores of examples `[checkpoints, examples]`, each right with a probability that is its checkpoint's."""
    return 100.0 * (rng.random((len(shares), size)) < np.array(shares)[:, None])


def test_one_seed_has_an_interval_over_examples() -> None:
    rng = np.random.default_rng(0)
    one = with_examples("finetune", 0, np.full((1, 80), 100.0), answers(rng, 0.4))
    (alone,) = found(one).values()
    half = 1.96 * 100 * (0.4 * 0.6 / 80) ** 0.5
    ci95 = alone.validation.ci95
    assert alone.validation.over == "examples" and ci95
    assert (ci95[1] - ci95[0]) / 2 == pytest.approx(half, rel=0.15)
    (both,) = found(one, with_examples("finetune", 1, np.full((1, 80), 100.0), answers(rng, 0.4))).values()
    assert both.validation.over == "seeds and examples"


def test_the_interval_is_around_the_area_though_maxima_of_noise_lie_above_it() -> None:
    rng = np.random.default_rng(1)
    equal = [0.5] * 12
    (whole,) = found(with_examples("finetune", 0, answers(rng, *equal), answers(rng, *equal))).values()
    one = whole.validation
    assert one.ci95 and one.ci95[0] < one.percent < one.ci95[1]
    assert sum(one.ci95) / 2 == pytest.approx(one.percent, abs=0.2 * (one.ci95[1] - one.ci95[0]))


def test_the_difference_of_areas_is_paired() -> None:
    """Both methods are right on the same examples, but ProMoT on some more: noise of the examples cancels."""
    rng = np.random.default_rng(2)
    target, icl = answers(rng, 0.7, size=400), answers(rng, 0.4, size=400)
    more = icl.copy()
    more[0, np.flatnonzero(more[0] == 0)[:30]] = 100
    areas = found(with_examples("finetune", 0, target, icl), with_examples("promot", 0, target, more))
    promot, base = areas["promot"].validation, areas["finetune"].validation
    assert promot.ci95 and base.ci95 and promot.ci95[0] < base.ci95[1]  # each interval has the other's area
    assert promot.change == pytest.approx(promot.percent - base.percent) and promot.change_ci95
    assert 0 < promot.change_ci95[0] < promot.change < promot.change_ci95[1]
    other = found(run("promot", 1, (1, 1), (2, 2)), run("finetune", 0, (1, 1), (2, 2)))["promot"]
    assert base.change is None and other.validation.change is None


def on_both_splits(method: str, seed: int, *points: tuple[tuple[float, float], tuple[float, float] | None]) -> Run:
    """A run at 1 shot with points of (target, ICL) on the validation and on the test split."""
    one = run(method, seed, (0, 0), *(validation for validation, _ in points), settings={"curve_shots": 1})
    curve = [one.curve[0]]
    for at, (_, test) in zip(one.curve[1:], points, strict=True):
        curve.append(replace(at, test=scored(*test) if test else None))
    return replace(one, curve=curve)


def scored(target: float, icl: float) -> Tested:
    tasks = {"a": Score(metric="m", score=icl, n=1)}
    return Tested(target=Target(task="t", metric="m", score=target, n=1), icl={"1": Icl.of(tasks)})


def test_points_are_chosen_on_the_validation_split_and_their_area_is_that_of_the_test_split() -> None:
    """The third point is on the frontier of the test split alone: it does not count."""
    points = (((50, 40), (52, 30)), ((80, 20), (70, 25)), ((40, 30), (90, 90)))
    (one,) = found(on_both_splits("finetune", 0, *points)).values()
    shown = [(pair(p.validation), p.on_frontier, p.test and pair(p.test)) for p in one.points]
    assert shown == [((80, 20), True, (70, 25)), ((50, 40), True, (52, 30)), ((40, 30), False, None)]
    assert one.validation.percent == pytest.approx((50 * 40 + 30 * 20) / 100)
    assert one.test and one.test.percent == pytest.approx((52 * 30 + 18 * 25) / 100)
    (part,) = found(on_both_splits("finetune", 0, points[0], ((80, 20), None))).values()
    assert part.test is None  # an area of some of the points would not compare


def test_the_pretrained_model_is_the_reference_of_the_test_split_too() -> None:
    one = on_both_splits("finetune", 0, ((50, 40), (60, 40)))
    before = replace(run("pretrained", 0), target=scored(20, 0).target)
    assert frontier.reference_on_test(comparison([one, before])) == 20
    assert frontier.reference_on_test(comparison([one])) == 0
    test = found(one, before)["finetune"].test
    assert test and test.percent == pytest.approx(40 * 40 / 80)


def test_nothing_to_draw_a_frontier_of() -> None:
    assert frontier.frontiers(Comparison(methods={"pretrained": [], "promot": []})) == []
