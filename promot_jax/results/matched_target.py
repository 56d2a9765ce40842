"""Comparison at matched target score: how much ICL is left once methods are equally good at the fine-tuned task.

A method that has learnt less of the target task has forgotten less too, so comparing best checkpoints can flatter a
slow learner.
Paper: the trade-off of figures 5 and 6.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from promot_jax import methods
from promot_jax.results.scores import StepEvaluation


@dataclass(frozen=True)
class Match:
    """The checkpoint of one run at the matched target score; scores on [0, 100], of the validation split."""

    threshold: float  # the target score that all methods reach
    step: int  # updates of the model
    target: float
    icl: float | None  # normalised average, None where it was not evaluated
    format_share: float | None  # percent, None for an open task
    alpha: float | None = None  # as in `StepEvaluation`


def model_tuning(points: Iterable[StepEvaluation]) -> list[StepEvaluation]:
    """The part of a curve in which the model is trained, by step."""
    stages = methods.model_tuning()
    return sorted((point for point in points if point.stage in stages), key=lambda point: point.step)


def matched(curves: Mapping[str, Sequence[Sequence[StepEvaluation]]]) -> dict[str, list[Match | None]]:
    """Finds each run's checkpoint at the target score that all methods reach.

    What is compared, seed by seed (the i-th curves of all methods): for each method the best target score on the
    validation split anywhere on its model-tuning curve (`methods.model_tuning`; never stage 1); the lowest of these is
    the threshold, so every method reaches it. Each method is represented by its *first* checkpoint whose target score
    is at or above the threshold: the least trained model that is good enough. ICL plays no part in the choice.

    Step 0 is left out. Before any update of the model ProMoT is prompt tuning alone, which keeps all ICL by
    construction; counting it would compare another method. Methods without any model-tuning curve (pretrained, prompt
    tuning) take no part. A seed counts only where every other method has a curve for it. The best score of a noisy
    curve is biased upwards, the more so the more checkpoints there are, so methods should be evaluated at the same
    steps.

    Args:
        curves: method -> one curve per seed, equally many and in the same order for all methods; a missing seed is an
            empty curve.

    Returns:
        method -> one Match per seed, None for a seed that does not count; methods that take no part are absent.
    """
    scored = {method: [_scored(curve) for curve in seeds] for method, seeds in curves.items()}
    scored = {method: seeds for method, seeds in scored.items() if any(seeds)}
    matches: dict[str, list[Match | None]] = {method: [] for method in scored}
    for of_seed in zip(*scored.values(), strict=True):
        threshold = min((max(point.target or 0.0 for point in points) for points in of_seed if points), default=0.0)
        for method, points in zip(scored, of_seed, strict=True):
            matches[method].append(_first(points, threshold) if all(of_seed) else None)
    return matches


def _scored(curve: Iterable[StepEvaluation]) -> list[StepEvaluation]:
    """Evaluations after at least one update of the model that have a target score."""
    return [point for point in model_tuning(curve) if point.step > 0 and point.target is not None]


def _first(points: Sequence[StepEvaluation], threshold: float) -> Match:
    point = next(point for point in points if (point.target or 0.0) >= threshold)
    return Match(threshold, point.step, point.target or 0.0, point.icl, point.format_share, point.alpha)
