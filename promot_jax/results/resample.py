"""Bootstrap resamples of evaluations, from the scores of single examples: the same for all methods and checkpoints.

A resample draws a task's examples with replacement, and gives every run that was evaluated on them the same draw. So
what makes an example hard for two methods cancels in their difference, and what makes it hard under every seed does not
pass for a new example under each. Where runs have other examples, their draws are independent.

All arrays start with the evaluation as it is, `[1 + RESAMPLES]`; the resamples follow. Equal data give equal resamples.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from promot_jax.results import example_scores
from promot_jax.results.bootstrap import LEVEL
from promot_jax.results.example_scores import ByEvaluation, ExampleScores
from promot_jax.results.schema import Comparison
from promot_jax.results.scores import Interval

RESAMPLES = 1000
NGRAMS = 4  # of BLEU
REMEMBERED = 16  # comparisons, of as many fine-tuning tasks
Given = ParamSpec("Given")
Found = TypeVar("Found")


def remembered(
    function: Callable[Concatenate[Comparison, Given], Found],
) -> Callable[Concatenate[Comparison, Given], Found]:
    """Remembers what a function found of the comparisons that it was called with last: reports ask several times."""
    known: list[tuple[Comparison, tuple[Any, ...], Found]] = []

    @functools.wraps(function)
    def wrapper(results: Comparison, *given: Given.args, **named: Given.kwargs) -> Found:
        asked = (given, named)
        for of, before, found in known:
            if of is results and before == asked:
                return found
        found = function(results, *given, **named)
        known.append((results, asked, found))
        del known[:-REMEMBERED]
        return found

    return wrapper


def of_task(task: str, scores: ExampleScores) -> np.ndarray | None:
    """Score of one task, `[1 + RESAMPLES]`; None for a metric of statistics whose formula is not known here."""
    counts = _counts(task, scores.examples, scores.size)
    values = scores.values()
    if values is not None:
        return counts @ values / scores.size
    of_sums = OF_SUMS.get(scores.metric)
    return None if of_sums is None else of_sums(counts @ np.asarray(scores.statistics, dtype=float))


def of_target(evaluations: ByEvaluation) -> dict[str, np.ndarray]:
    """Score of each fine-tuned task, `[1 + RESAMPLES]`, as `of_task`."""
    return _known(evaluations.get(example_scores.TARGET, {}))


def of_icl(evaluations: ByEvaluation, shots: int | str) -> dict[str, np.ndarray]:
    """Score of each ICL task at a number of shots, mean over the draws of exemplars, as `of_task`."""
    draws = [_known(tasks) for name, tasks in evaluations.items() if example_scores.is_icl(name, shots)]
    common = [task for task in draws[0] if all(task in draw for draw in draws)] if draws else []
    return {task: np.mean([draw[task] for draw in draws], axis=0) for task in common}


def over_seeds(values: np.ndarray) -> np.ndarray:
    """Mean over seeds, `[1 + RESAMPLES]`, of their scores `[seeds, 1 + RESAMPLES]`; resamples draw seeds as well."""
    return np.einsum("sr,rs->r", values, _weights(len(values)))


def alone(values: np.ndarray) -> np.ndarray:
    """`over_seeds` of scores that do not move with the examples."""
    return over_seeds(np.broadcast_to(values[:, :1], values.shape))


def interval(
    values: np.ndarray, of_seeds: np.ndarray, seeds: int, *, least: float = 0.0, centred: bool = False
) -> Interval:
    """Percentiles of the resamples at `bootstrap.LEVEL`, made wider for few seeds.

    A few seeds say little of their own variance: the normal quantile that a bootstrap amounts to becomes Student's, of
    Satterthwaite's degrees of freedom. That is `seeds - 1` where seeds alone make the variance, many where examples do.

    Args:
        values: `[1 + RESAMPLES]`, the estimate first.
        of_seeds: the same where resamples draw seeds alone.
        seeds: how many there are.
        least: possible value; the greatest is 100.
        centred: whether the resamples are moved to have their mean at the estimate, which maxima of noise lie above.
    """
    from scipy.special import ndtri, stdtrit  # a fraction of the import of scipy.stats

    tail = (1 + LEVEL) / 2
    ends = np.quantile(values[1:], [1 - tail, tail]) - (values[1:].mean() - values[0] if centred else 0.0)
    variance = of_seeds[1:].var()
    if seeds > 1 and variance > 0:
        freedom = (seeds - 1) * max(1.0, values[1:].var() / variance) ** 2
        ends = values[0] + (ends - values[0]) * stdtrit(freedom, tail) / ndtri(tail)
    low, high = np.clip(ends, least, 100.0)
    return float(low), float(high)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of sums of the statistics of `tasks.metrics.bleu`, `[..., 10]`, as sacreBLEU computes it.

    The statistics are the matching and all n-grams (n = 1 to 4 each), and the lengths of output and reference. An order
    without a match counts as half a match, the next one as a quarter (sacreBLEU's smoothing "exp").
    """
    matches, totals = sums[..., :NGRAMS], sums[..., NGRAMS : 2 * NGRAMS]
    length, reference = sums[..., 2 * NGRAMS], sums[..., 2 * NGRAMS + 1]
    halves = 2.0 ** np.cumsum((matches == 0) & (totals > 0), axis=-1)
    precisions = np.where(matches > 0, matches, 1 / halves) / np.maximum(totals, 1)
    mean = np.exp(np.log(precisions).mean(axis=-1))
    brevity = np.exp(np.minimum(0.0, 1 - reference / np.maximum(length, 1)))
    return np.where((totals > 0).all(axis=-1) & (matches > 0).any(axis=-1), 100 * np.minimum(mean * brevity, 1), 0.0)


OF_SUMS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"bleu": bleu}


def _known(tasks: Mapping[str, ExampleScores]) -> dict[str, np.ndarray]:
    found = {task: of_task(task, scores) for task, scores in tasks.items()}
    return {task: values for task, values in found.items() if values is not None}


@functools.lru_cache(maxsize=32)
def _counts(task: str, examples: str, size: int) -> np.ndarray:
    """How often each resample has each example, `[1 + RESAMPLES, examples]`; each once in the evaluation as it is."""
    seed = int.from_bytes(hashlib.sha256(f"{task} {examples}".encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return np.concatenate([np.ones((1, size)), drawn])


@functools.lru_cache(maxsize=32)
def _weights(seeds: int) -> np.ndarray:
    """How much each seed weighs in each resample, `[1 + RESAMPLES, seeds]`; rows sum to 1.

    A resample draws one seed fewer than there are: drawing them all would make the variance between few seeds too small
    by (seeds - 1) / seeds (Rao and Wu, 1988). A single seed has no variance that could be drawn.
    """
    whole = np.full((1, seeds), 1 / seeds)
    drawn = np.random.default_rng(seeds).multinomial(max(seeds - 1, 1), whole[0], RESAMPLES) / max(seeds - 1, 1)
    return np.concatenate([whole, drawn])
