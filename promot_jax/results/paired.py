"""Paired differences between methods: on the same examples with the same exemplars, under the same seeds.

Two-level bootstrap: a resample draws seeds, and examples (`results.resample`), for both methods alike. With one seed
the interval is over examples only. Question-level pairing: Miller, 2024, arXiv 2411.00640.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from promot_jax.methods import BASELINE, PROMOT, REFERENCE
from promot_jax.results import example_scores, resample
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Interval, Tested

AVERAGE = "Norm. Avg."
TARGET = "target"
Score = tuple[str, str | None]  # TARGET, an ICL task or AVERAGE, and the number of shots


@dataclass(frozen=True)
class Difference:
    """How much higher one method scores than another."""

    first: str  # method
    second: str  # method that is subtracted
    score: str  # TARGET, an ICL task or AVERAGE
    shots: str | None  # of ICL
    mean: float  # over seeds, on [-100, 100]
    ci95: Interval
    seeds: int  # that both methods have; the interval of one seed is over examples only
    examples: int  # of each seed

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Every method against fine-tuning, then ProMoT against every other; pretrained comes last on both lists."""
    names = sorted(methods, key=lambda name: name == REFERENCE)
    against = [(name, BASELINE) for name in sorted(names, key=lambda name: name != PROMOT) if name != BASELINE]
    promot = [(PROMOT, name) for name in names if name not in (PROMOT, BASELINE)]
    return [pair for pair in [*against, *promot] if set(pair) <= set(names)]


@resample.remembered
def differences(results: Comparison, checkpoint: Literal["best", "matched_test"] = "best") -> list[Difference]:
    """The differences on the test split, for `pairs` and every score that both methods have.

    Of the best checkpoints, or of those at matched target score.

    A score counts of the seeds under which both methods were evaluated on equal examples, in context with equal
    prompts. ICL scores are means over draws of exemplars. An average needs every task that either method has.
    """
    resampled = {
        method: {run.seed: _Resampled(scored) for run in runs if isinstance(scored := run.at(checkpoint), Run | Tested)}
        for method, runs in results.methods.items()
    }
    found: list[Difference] = []
    for first, second in pairs(results.methods):
        by_score: dict[Score, list[tuple[np.ndarray, int]]] = {}
        for seed in sorted(resampled[first].keys() & resampled[second].keys()):
            for key, change, size in _between(resampled[first][seed], resampled[second][seed]):
                by_score.setdefault(key, []).append((change, size))
        for (score, shots), members in by_score.items():
            changes, sizes = zip(*members, strict=True)
            stacked = np.stack(changes)
            values = resample.over_seeds(stacked)
            ci95 = resample.interval(values, resample.alone(stacked), len(sizes), least=-100.0)
            numbers = float(values[0]), ci95, len(sizes), max(sizes)
            found.append(Difference(first, second, score, shots, *numbers))
    return found


class _Resampled:
    """A checkpoint's scores with their resamples, by task and number of shots; None is that of the fine-tuned task."""

    def __init__(self, run: Run | Tested):
        evaluated = run.example_scores
        target = evaluated.get(example_scores.TARGET, {})
        named = [*run.target.tasks] if run.target else []
        # What should have scores: an average over other tasks would not compare.
        self.whole: dict[str | None, set[str]] = {None: set(named or target)}
        self.whole |= {shots: set(icl.tasks) for shots, icl in run.icl.items()}
        self.scores: dict[Score, np.ndarray] = {}
        self.scores |= {(task, None): values for task, values in resample.of_target(evaluated).items()}
        self.given: dict[Score, list[str]] = {}  # digests of what the model was given
        self.sizes: dict[Score, int] = {}
        for task, scores in target.items():  # methods may put other text around its inputs
            self._add(task, None, scores, scores.examples)
        for shots in run.icl:
            self.scores |= {(task, shots): values for task, values in resample.of_icl(evaluated, shots).items()}
            for name, tasks in evaluated.items():
                for task, scores in tasks.items() if example_scores.is_icl(name, shots) else ():
                    self._add(task, shots, scores, f"{name} {scores.examples} {scores.prompts}")

    def _add(self, task: str, shots: str | None, scores: ExampleScores, digest: str) -> None:
        self.given.setdefault((task, shots), []).append(digest)
        self.sizes[task, shots] = scores.size


def _between(one: _Resampled, other: _Resampled) -> Iterator[tuple[Score, np.ndarray, int]]:
    """Differences of two runs of one seed, `[1 + RESAMPLES]`, with their numbers of examples."""
    for shots, tasks in one.whole.items():
        wanted = tasks | other.whole.get(shots, set())
        keys: list[Score] = [(task, shots) for task in sorted(wanted)]
        paired = [key for key in keys if _same(one, other, key)]
        changes = {key: one.scores[key] - other.scores[key] for key in paired}
        for key in paired if shots is not None else ():
            yield key, changes[key], one.sizes[key]
        if keys and paired == keys:
            name = TARGET if shots is None else AVERAGE
            yield (name, shots), np.mean([*changes.values()], axis=0), sum(one.sizes[key] for key in keys)


def _same(one: _Resampled, other: _Resampled, key: Score) -> bool:
    """Whether both runs have scores of a task, on equal examples."""
    return key in one.scores and key in other.scores and one.given[key] == other.given[key]
