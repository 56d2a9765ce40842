"""Bootstrap intervals over examples, the paper's normalised average, and spread over seeds.

The intervals are percentile bootstraps over the evaluated examples: they say how much a score would move with other
examples of the same kind, not with another seed. Where all examples score alike (all right, all wrong) the interval
has no width, which overstates certainty.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from promot_jax.errors import UserError

RESAMPLES = 1000
CORPUS_RESAMPLES = 200  # a corpus metric is computed anew for each, in Python
_CHUNK = 2_000_000  # indices drawn at once, so that large splits do not take the memory of resamples x examples


class Outputs(NamedTuple):
    """A task's post-processed targets and predictions, and the seqio-style metric that scores them.

    A metric that is a mean over examples carries the attribute `per_example`, a function of one target and one
    prediction. For others (BLEU) the metric is computed anew for each resampling.

    Attributes:
        targets: one per example.
        predictions: one per example, in the order of the targets.
        metric: `fn(targets, predictions) -> {name: score}`; the first name counts.
    """

    targets: Sequence[Any]
    predictions: Sequence[Any]
    metric: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Any]]


Sample = Sequence[float] | np.ndarray | Outputs | tuple[Sequence[Any], Sequence[Any], Callable[..., Mapping[str, Any]]]


class Spread(NamedTuple):
    """Values of several seeds: their mean, the ends of their interval, and how many seeds there are."""

    mean: float
    low: float
    high: float
    seeds: int


def draws(sample: Sample, *, resamples: int | None = None, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Scores of `resamples` resamplings of the examples with replacement.

    Args:
        sample: per-example scores, or `Outputs` (a plain (targets, predictions, metric) will do).
        resamples: 1000 for per-example scores, 200 for corpus metrics when None.
        seed: equal seeds give equal draws.

    Returns:
        [resamples] float64.

    Raises:
        ValueError: there is no example, or targets and predictions differ in number.
    """
    scores, outputs = _split(sample)
    size = len(scores) if outputs is None else len(outputs.targets)
    if size == 0:
        raise ValueError("a bootstrap needs at least one example")
    generator = np.random.default_rng(seed)
    if outputs is None:
        count = RESAMPLES if resamples is None else resamples
        chunk = max(1, _CHUNK // size)
        starts = range(0, count, chunk)
        indices = (generator.integers(0, size, (min(chunk, count - start), size)) for start in starts)
        return np.concatenate([scores[rows].mean(axis=1) for rows in indices])
    count = CORPUS_RESAMPLES if resamples is None else resamples
    values = np.empty(count)
    for row in range(count):
        chosen = generator.integers(0, size, size)
        targets = [outputs.targets[index] for index in chosen]
        metrics = outputs.metric(targets, [outputs.predictions[index] for index in chosen])
        first = next(iter(metrics.values()))
        values[row] = float(getattr(first, "value", first))
    return values


def interval(
    sample: Sample, *, level: float = 0.95, resamples: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of one task's score.

    Args:
        sample: per-example scores, or `Outputs` (a plain (targets, predictions, metric) will do).
        level: coverage, in (0, 1).
        resamples: as in `draws`.
        seed: equal seeds give equal intervals.

    Returns:
        (low, high), in the unit of the scores.
    """
    return _quantiles(draws(sample, resamples=resamples, seed=seed), level)


def normalized_average(scores: Mapping[str, float]) -> float:
    """The paper's Norm. Avg.: the mean over tasks of their scores, each on [0, 100], every task weighing the same.

    Args:
        scores: task name -> score of the task's metric.

    Raises:
        UserError: there is no task, or a score is not on [0, 100].
    """
    if not scores:
        raise UserError("A normalised average needs at least one task: name an ICL mixture that has tasks.")
    for task, score in scores.items():
        if not 0 <= score <= 100:  # NaN fails too
            raise UserError(f"Task {task!r} has score {score}, but a normalised average takes scores from 0 to 100.")
    return math.fsum(scores.values()) / len(scores)


def average_interval(
    samples: Mapping[str, Sample], *, level: float = 0.95, resamples: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the normalised average: examples are resampled within each task, independently.

    Args:
        samples: task name -> per-example scores or `Outputs`.
        level: coverage, in (0, 1).
        resamples: as in `draws`.
        seed: equal seeds give equal intervals, whatever the order of the tasks.

    Returns:
        (low, high) on [0, 100].
    """
    if not samples:
        raise ValueError("the interval of a normalised average needs at least one task")
    # A generator per task: tasks of the same size must not be resampled by the same indices.
    columns = [
        draws(samples[task], resamples=resamples, seed=(seed, zlib.crc32(task.encode()))) for task in sorted(samples)
    ]
    length = max(map(len, columns))
    # Tasks are independent, so repeating the fewer draws of a corpus metric pairs them with new draws of the others.
    return _quantiles(np.mean([np.resize(column, length) for column in columns], axis=0), level)


def across_seeds(
    values: Iterable[float | None], *, kind: Literal["range", "t"] = "range", level: float = 0.95
) -> Spread | None:
    """Mean over seeds with their range, or with Student's t-interval of the mean.

    Args:
        values: one per seed; None and what is not finite (a seed that is not there yet) are left out.
        kind: "range" gives minimum and maximum, "t" the interval, which assumes normally distributed seeds and is
            infinitely wide for one.
        level: coverage of the t-interval, in (0, 1).

    Returns:
        None when no value is left.
    """
    known = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=float)
    if not len(known):
        return None
    mean = float(known.mean())
    if kind == "range":
        return Spread(mean, float(known.min()), float(known.max()), len(known))
    if len(known) == 1:
        return Spread(mean, -math.inf, math.inf, 1)
    from scipy.special import stdtrit  # scipy comes with JAX; imported here to keep this module light

    half = float(stdtrit(len(known) - 1, 0.5 + level / 2)) * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Spread(mean, mean - half, mean + half, len(known))


def _split(sample: Sample) -> tuple[np.ndarray, Outputs | None]:
    """Per-example scores where there are any, else the outputs to be scored as a corpus."""
    if not (isinstance(sample, tuple) and len(sample) == 3 and callable(sample[2])):
        return np.asarray(sample, dtype=float), None
    outputs = Outputs(*sample)
    if len(outputs.targets) != len(outputs.predictions):
        sizes = f"{len(outputs.targets)} targets and {len(outputs.predictions)} predictions"
        raise ValueError(f"there must be one prediction for each target, but there are {sizes}")
    per_example = getattr(outputs.metric, "per_example", None)
    if per_example is None:
        return np.empty(0), outputs
    return np.array(
        [per_example(*pair) for pair in zip(outputs.targets, outputs.predictions, strict=True)], dtype=float
    ), None


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
