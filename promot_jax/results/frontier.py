"""The frontier of a method: the ICL it keeps at each target score, over all settings and checkpoints that were tried.

A point is a checkpoint after at least one update of the model (or an alpha above 0): its target score and ICL
normalised average on the validation split, mean over seeds. The frontier is the points that no other point of the
method exceeds in both. Its area is the share of the rectangle from the reference, the pretrained model's target score
at an ICL of 0, to (100, 100) that lies below and to the left of a point.

Points are chosen on the validation split. Where checkpoints were scored on the test split too
(`Evaluation.curve_test`), the same points have an area there that no choice has lifted.

Step 0 is left out, as at matched target score (`results.matched_target`): it is the pretrained model, or prompt tuning.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from promot_jax.methods import BASELINE, REFERENCE, is_plain
from promot_jax.results import resample
from promot_jax.results.example_scores import ByEvaluation
from promot_jax.results.matched_target import model_tuning
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Interval, StepEvaluation, Tested

Key = tuple[tuple[tuple[str, float], ...], int]  # settings that were varied, and the step


@dataclass(frozen=True)
class Scores:
    """Target score and ICL average, means over seeds, with 95 % bootstrap intervals; None where there are none."""

    target: float
    icl: float
    target_ci95: Interval | None
    icl_ci95: Interval | None


@dataclass(frozen=True)
class Point:
    """A checkpoint."""

    varied: dict[str, float]  # its settings
    step: int
    alpha: float | None  # as in `StepEvaluation`
    validation: Scores
    on_frontier: bool
    test: Scores | None  # of a point on the frontier


@dataclass(frozen=True)
class Area:
    """Area of a frontier, in percent of the rectangle."""

    percent: float
    ci95: Interval | None  # 95 % bootstrap interval, over what `over` says (`resample.interval`, centred)
    over: str  # "seeds and examples", "seeds", "examples" or ""
    change: float | None  # less that of fine-tuning; None for fine-tuning, and where their seeds differ
    change_ci95: Interval | None


@dataclass(frozen=True)
class Frontier:
    """All points of a method."""

    method: str
    points: tuple[Point, ...]  # by target score, falling
    seeds: int  # of each point
    left_out: int  # points that not every seed has
    validation: Area
    test: Area | None  # of the points that are the frontier on the validation split


@dataclass(frozen=True)
class Chosen:
    """The final evaluation (test split) of a method's runs with the settings and checkpoints that were chosen."""

    method: str
    scores: Scores
    seeds: int


def reference(results: Comparison) -> tuple[float, float | None]:
    """Target score and ICL average of the pretrained model on the validation split: what plain methods start from.

    The target score is 0 where no curve has it.
    """
    starts = [
        point
        for run in [*results.runs, *results.others]
        for point in model_tuning(run.curve)
        if point.step == 0 and is_plain(run.method)
    ]
    targets = [point.target for point in starts if point.target is not None]
    averages = [point.icl for point in starts if point.icl is not None]
    return float(np.mean(targets)) if targets else 0.0, float(np.mean(averages)) if averages else None


def reference_on_test(results: Comparison) -> float:
    """The pretrained model's target score on the test split; on the validation split where there is none."""
    runs = results.methods.get(REFERENCE, [])
    targets = [run.target.score for run in runs if run.target and run.target.score is not None]
    return float(np.mean(targets)) if targets else reference(results)[0]


@resample.remembered
def frontiers(results: Comparison) -> list[Frontier]:
    """The frontier of every method with points, in order of the comparison."""
    measured = {method: _Measured(results, method) for method in results.methods}
    measured = {method: each for method, each in measured.items() if each.keys}
    validation = _areas({method: (each, each.validation) for method, each in measured.items()}, reference(results)[0])
    tested = {method: (each, each.test) for method, each in measured.items() if each.test}
    test = _areas(tested, reference_on_test(results))
    return [
        Frontier(method, each.points(), len(each.seeds), each.left_out, validation[method], test.get(method))
        for method, each in measured.items()
    ]


def chosen(results: Comparison, shots: str) -> list[Chosen]:
    """What the chosen checkpoints score on the test split, of methods with a target score and an ICL average."""
    found = []
    for method, runs in results.methods.items():
        known = [(run, tested) for run in runs if (tested := _tested(run, shots))]
        if not known:
            continue
        split = _Split([[tested for _, tested in known]])
        (scores,) = split.scores()
        run, _ = known[0]
        if not split.over and run.target:  # one older run: its own intervals are over examples
            scores = Scores(scores.target, scores.icl, run.target.ci95, run.icl[shots].ci95)
        found.append(Chosen(method, scores, len(known)))
    return found


def by_setting(results: Comparison, method: str) -> list[tuple[Mapping[str, float], Run]]:
    """All runs of a method, with what was varied: those with the chosen settings first."""
    chosen = results.selection[method].chosen if method in results.selection else {}
    runs: list[tuple[Mapping[str, float], Run]] = [(chosen, run) for run in results.methods[method]]
    return runs + [(run.varied, run) for run in results.others if run.method == method]


def area(targets: np.ndarray, icls: np.ndarray, least: float) -> np.ndarray:
    """Percent of the rectangle from (least, 0) to (100, 100) that points cover; `[..., points]` to `[...]`."""
    order = np.argsort(-targets, axis=-1, kind="stable")
    falling = np.maximum(np.take_along_axis(targets, order, axis=-1), least)
    heights = np.maximum.accumulate(np.take_along_axis(icls, order, axis=-1), axis=-1)
    widths = falling - np.concatenate([falling[..., 1:], np.full_like(falling[..., :1], least)], axis=-1)
    return (heights * widths).sum(axis=-1) / max(100 - least, 1e-9)


def non_dominated(targets: np.ndarray, icls: np.ndarray) -> np.ndarray:
    """Which points no other one exceeds in one score without being below it in the other; of equals all."""
    t, i = targets[:, None], icls[:, None]
    exceeded = (targets >= t) & (icls >= i) & ((targets > t) | (icls > i))
    return np.logical_not(exceeded.any(axis=1))


_Seed = tuple[float, float, np.ndarray | None]  # of a seed: target score, ICL average, and how they move (`_moves`)


class _Split:
    """Scores of points on one split, with their resamples."""

    def __init__(self, points: Sequence[Sequence[_Seed]]):
        self.seeds = seeds = len(points[0]) if points else 0
        by_examples = all(move is not None for of in points for _, _, move in of)
        sources = {"seeds": seeds > 1, "examples": by_examples and bool(points)}
        self.over = " and ".join(name for name, there in sources.items() if there)
        # [points, target and ICL, 1 + RESAMPLES]; `alone` where resamples draw seeds alone
        by_seed = [_by_seed(of) for of in points]
        self.values = np.array([[resample.over_seeds(side) for side in of] for of in by_seed])
        self.alone = np.array([[resample.alone(side) for side in of] for of in by_seed])

    def areas(self, least: float) -> np.ndarray:
        """Area, `[2, 1 + RESAMPLES]`: where resamples draw all that they can, and seeds alone."""
        return np.stack([area(each[:, 0].T, each[:, 1].T, least) for each in (self.values, self.alone)])

    def scores(self) -> list[Scores]:
        """Scores of each point."""
        found = []
        for values, alone in zip(self.values, self.alone, strict=True):
            of_target, of_icl = (
                resample.interval(values[side], alone[side], self.seeds) if self.over else None for side in (0, 1)
            )
            found.append(Scores(float(values[0, 0]), float(values[1, 0]), of_target, of_icl))
        return found


class _Measured:
    """The points of a method, with their resamples."""

    def __init__(self, results: Comparison, method: str):
        by_key: dict[Key, dict[int, tuple[Run, StepEvaluation]]] = {}
        for varied, run in by_setting(results, method):
            for point in _scored(run.curve):
                by_key.setdefault((tuple(varied.items()), point.step), {})[run.seed] = run, point
        most = max(map(len, by_key.values()), default=0)
        keys = {key: dict(sorted(of.items())) for key, of in by_key.items() if len(of) == most}
        self.seeds = next(([*of] for of in keys.values()), [])
        self.keys = {key: [*of.values()] for key, of in keys.items() if [*of] == self.seeds}
        self.left_out = len(by_key) - len(self.keys)
        self.validation = _Split([[_validated(*member) for member in of] for of in self.keys.values()])
        values = self.validation.values
        self.kept = non_dominated(values[:, 0, 0], values[:, 1, 0]) if self.keys else np.zeros(0, bool)
        front = [of for of, kept in zip(self.keys.values(), self.kept, strict=True) if kept]
        tested = [[_tested(p.test, str(run.settings.get("curve_shots", ""))) for run, p in of] for of in front]
        known = [[scores for scores in of if scores] for of in tested]
        self.test = _Split(known) if known and all(len(of) == len(self.seeds) for of in known) else None

    def points(self) -> tuple[Point, ...]:
        test = iter(self.test.scores() if self.test else [])
        found = []
        for ((varied, step), of), kept, scores in zip(
            self.keys.items(), self.kept, self.validation.scores(), strict=True
        ):
            _, point = of[0]
            on_test = next(test, None) if kept else None
            found.append(Point(dict(varied), step, point.alpha, scores, bool(kept), on_test))
        return tuple(sorted(found, key=lambda point: (-point.validation.target, point.validation.icl)))


def _areas(splits: Mapping[str, tuple[_Measured, _Split]], least: float) -> dict[str, Area]:
    """The areas on one split, by method, and their differences to fine-tuning."""
    areas = {method: split.areas(least) for method, (_, split) in splits.items()}
    found = {}
    for method, (each, split) in splits.items():
        change: tuple[float | None, Interval | None] = None, None
        if method != BASELINE and BASELINE in splits and splits[BASELINE][0].seeds == each.seeds:
            differences = areas[method] - areas[BASELINE]
            known = split.over and splits[BASELINE][1].over
            whole, alone = differences
            ends = resample.interval(whole, alone, split.seeds, least=-100.0, centred=True) if known else None
            change = float(whole[0]), ends
        whole, alone = areas[method]
        ci95 = resample.interval(whole, alone, split.seeds, centred=True) if split.over else None
        found[method] = Area(float(whole[0]), ci95, split.over, *change)
    return found


def _scored(curve: Iterable[StepEvaluation]) -> list[StepEvaluation]:
    return [p for p in model_tuning(curve) if p.step > 0 and p.target is not None and p.icl is not None]


def _validated(run: Run, point: StepEvaluation) -> _Seed:
    moves = _moves(point.example_scores, run.settings.get("curve_shots", ""), point.tasks)
    return point.target or 0.0, point.icl or 0.0, moves


def _tested(one: Run | Tested | None, shots: str) -> _Seed | None:
    """Scores on the test split; None without a target score and an ICL average."""
    if one is None or one.target is None or shots not in one.icl:
        return None
    target, icl = one.target.score, one.icl[shots]
    if target is None or icl.norm_avg is None:
        return None
    return target, icl.norm_avg, _moves(one.example_scores, shots, icl.tasks)


def _moves(evaluated: ByEvaluation, shots: int | str, tasks: Collection[str]) -> np.ndarray | None:
    """How target score and ICL average move with the examples, `[2, 1 + RESAMPLES]`; None without the tasks' scores."""
    target, icl = resample.of_target(evaluated), resample.of_icl(evaluated, shots)
    if not target or not icl or icl.keys() != {*tasks}:
        return None
    means = np.stack([np.mean([*scores.values()], axis=0) for scores in (target, icl)])
    return means - means[:, :1]


def _by_seed(seeds: Sequence[_Seed]) -> np.ndarray:
    """Target score and ICL average of each seed, `[2, seeds, 1 + RESAMPLES]`."""
    still = np.zeros((2, 1 + resample.RESAMPLES))
    values = [np.array([[target], [icl]]) + (still if move is None else move) for target, icl, move in seeds]
    return np.stack(values, axis=1)
