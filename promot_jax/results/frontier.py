"""The frontier of a method: the ICL it keeps at each target score, over all settings and checkpoints that were tried.

A point is a checkpoint after at least one update of the model (or an alpha above 0): its target score and ICL
normalised average on the validation split, mean over seeds. The frontier is the points that no other point of the
method exceeds in both. Its area is the share of the rectangle from the reference, the pretrained model's target score
at an ICL of 0, to (100, 100) that lies below and to the left of a point.

Step 0 is left out, as at matched target score (`results.matched_target`): it is the pretrained model, or prompt tuning.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from promot_jax.methods import is_plain
from promot_jax.results import resample
from promot_jax.results.example_scores import ByEvaluation
from promot_jax.results.matched_target import model_tuning
from promot_jax.results.paired import BASELINE
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Interval, StepEvaluation

Key = tuple[tuple[tuple[str, float], ...], int]  # settings that were varied, and the step


@dataclass(frozen=True)
class Point:
    """A checkpoint, on the validation split; scores are means over seeds."""

    varied: dict[str, float]  # its settings
    step: int
    alpha: float | None  # as in `StepEvaluation`
    target: float
    icl: float
    target_ci95: Interval | None  # as `Frontier.ci95`
    icl_ci95: Interval | None
    on_frontier: bool


@dataclass(frozen=True)
class Chosen:
    """The final evaluation (test split) of a method's runs with the settings and checkpoints that were chosen."""

    method: str
    target: float  # means over seeds
    icl: float
    target_ci95: Interval | None  # as `Frontier.ci95`; of one older run that over its examples
    icl_ci95: Interval | None
    seeds: int


@dataclass(frozen=True)
class Frontier:
    """All points of a method."""

    method: str
    points: tuple[Point, ...]  # by target score, falling
    seeds: int  # of each point
    left_out: int  # points that not every seed has
    area: float  # percent of the rectangle
    # 95 % bootstrap interval of the area, over what `over` says; None where that is nothing
    ci95: Interval | None
    over: str  # "seeds and examples", "seeds", "examples" or ""
    change: float | None = None  # area less that of fine-tuning, None where their seeds differ
    change_ci95: Interval | None = None


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


def frontiers(results: Comparison) -> list[Frontier]:
    """The frontier of every method with points, in order of the comparison."""
    least, _ = reference(results)
    measured = {method: _Measured(results, method) for method in results.methods}
    areas = {method: each.areas(least) for method, each in measured.items() if each.keys}
    found = []
    for method, area in areas.items():
        each, base = measured[method], measured.get(BASELINE)
        change = change_ci95 = None
        if base and BASELINE in areas and method != BASELINE and base.seeds == each.seeds:
            differences = area - areas[BASELINE]
            change, change_ci95 = float(differences[0]), _centred(differences) if each.over and base.over else None
        ci95 = _centred(area) if each.over else None
        numbers = len(each.seeds), each.left_out, float(area[0]), ci95, each.over
        found.append(Frontier(method, each.points(), *numbers, change, change_ci95))
    return found


def chosen(results: Comparison, shots: str) -> list[Chosen]:
    """What the chosen checkpoints score on the test split, of methods with a target score and an ICL average."""
    found = []
    for method, runs in results.methods.items():
        scored = [(run, run.target.score, run.icl[shots].norm_avg) for run in runs if run.target and shots in run.icl]
        points = [(run, target, icl) for run, target, icl in scored if target is not None and icl is not None]
        if not points:
            continue
        moves = [_moves(run.example_scores, shots, run.icl[shots].tasks) for run, _, _ in points]
        scores = _over_seeds([(target, icl) for _, target, icl in points], moves)
        of_target: Interval | None
        of_icl: Interval | None
        of_target, of_icl = map(resample.interval, scores)
        if len(points) == 1 and moves[0] is None:
            (run, _, _) = points[0]
            of_target, of_icl = run.target.ci95 if run.target else None, run.icl[shots].ci95
        found.append(Chosen(method, float(scores[0, 0]), float(scores[1, 0]), of_target, of_icl, len(points)))
    return found


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


def _centred(values: np.ndarray) -> Interval:
    """Interval of the resamples, moved to have its mean at the estimate.

    A frontier takes maxima, so what resampling adds in noise lifts every resample.
    """
    low, high = resample.interval(values)
    lift = float(values[1:].mean() - values[0])
    return low - lift, high - lift


class _Measured:
    """The points of a method, with their resamples."""

    def __init__(self, results: Comparison, method: str):
        chosen = results.selection[method].chosen if method in results.selection else {}
        runs = [(chosen, run) for run in results.methods[method]]
        runs += [(run.varied, run) for run in results.others if run.method == method]
        by_key: dict[Key, dict[int, tuple[Run, StepEvaluation]]] = {}
        for varied, run in runs:
            for point in _scored(run.curve):
                by_key.setdefault((tuple(varied.items()), point.step), {})[run.seed] = run, point
        most = max(map(len, by_key.values()), default=0)
        self.keys = {key: dict(sorted(of.items())) for key, of in by_key.items() if len(of) == most}
        self.seeds = next(([*of] for of in self.keys.values()), [])
        self.keys = {key: of for key, of in self.keys.items() if [*of] == self.seeds}
        self.left_out = len(by_key) - len(self.keys)
        resampled = [
            [_moves(p.example_scores, run.settings.get("curve_shots", ""), p.tasks) for run, p in of.values()]
            for of in self.keys.values()
        ]
        by_examples = all(one is not None for of in resampled for one in of)
        sources = {"seeds": len(self.seeds) > 1, "examples": by_examples and bool(self.keys)}
        self.over = " and ".join(name for name, there in sources.items() if there)
        # [points, 2 (target and ICL), 1 + resamples]
        scores = [[(p.target or 0.0, p.icl or 0.0) for _, p in of.values()] for of in self.keys.values()]
        self.scores = np.array([_over_seeds(*of) for of in zip(scores, resampled, strict=True)])

    def areas(self, least: float) -> np.ndarray:
        """Area of the frontier, `[1 + RESAMPLES]`."""
        return area(self.scores[:, 0].T, self.scores[:, 1].T, least)

    def points(self) -> tuple[Point, ...]:
        targets, icls = self.scores[:, 0, 0], self.scores[:, 1, 0]
        kept = non_dominated(targets, icls)
        found = []
        for index, ((varied, step), of) in enumerate(self.keys.items()):
            of_target, of_icl = (resample.interval(scores) if self.over else None for scores in self.scores[index])
            _, point = next(iter(of.values()))
            scores = float(targets[index]), float(icls[index])
            found.append(Point(dict(varied), step, point.alpha, *scores, of_target, of_icl, bool(kept[index])))
        return tuple(sorted(found, key=lambda point: (-point.target, point.icl)))


def _scored(curve: Iterable[StepEvaluation]) -> list[StepEvaluation]:
    return [p for p in model_tuning(curve) if p.step > 0 and p.target is not None and p.icl is not None]


def _moves(evaluated: ByEvaluation, shots: int | str, tasks: Collection[str]) -> np.ndarray | None:
    """How target score and ICL average move with the examples, `[2, 1 + RESAMPLES]`; None without the tasks' scores."""
    target, icl = resample.of_target(evaluated), resample.of_icl(evaluated, shots)
    if not target or not icl or icl.keys() != {*tasks}:
        return None
    means = np.stack([np.mean([*scores.values()], axis=0) for scores in (target, icl)])
    return means - means[:, :1]


def _over_seeds(scores: Sequence[tuple[float, float]], moves: Sequence[np.ndarray | None]) -> np.ndarray:
    """Target score and ICL average, means over the seeds' scores, `[2, 1 + RESAMPLES]`."""
    still = np.zeros((2, 1 + resample.RESAMPLES))
    values = [
        np.array(of_seed)[:, None] + (still if move is None else move)
        for of_seed, move in zip(scores, moves, strict=True)
    ]
    return np.stack([resample.over_seeds(np.stack([value[side] for value in values])) for side in (0, 1)])
