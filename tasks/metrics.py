"""Metrics of post-processed text, in SeqIO's form `fn(targets, predictions) -> {name: score}`, all on [0, 100].

A target is a string, or a list of strings if several answers are right; the best match counts. Each metric also gives
the statistics of single examples, for the bootstrap (`promot_jax.results.bootstrap`).
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

Target = str | Sequence[str]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_ROUGE = rouge_scorer.RougeScorer(["rouge2"])
_BLEU = BLEU(effective_order=True)  # avoids a warning about sentence scores; only their counts are used


@dataclass(frozen=True)
class MeanMetric:
    """The mean of a score per example."""

    name: str  # the key of the score
    per_example: Callable[[Target, str], float]  # (target, prediction) -> score on [0, 100]

    def __call__(self, targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
        """Returns the mean score. Raises ValueError if there are no examples, or the lengths differ."""
        scores = _each(self.name, self.per_example, targets, predictions)
        return {self.name: sum(scores) / len(scores)}


@dataclass(frozen=True)
class CorpusMetric:
    """A score of all examples together, computed from the sums of each example's statistics."""

    name: str  # the key of the score
    # (target, prediction) -> numbers of one example; their count is fixed.
    statistics: Callable[[Target, str], Sequence[float]]
    of_sums: Callable[[np.ndarray], float]  # sums of the statistics over examples -> score on [0, 100]

    def __call__(self, targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
        """Returns the score. Raises ValueError if there are no examples, or the lengths differ."""
        return {self.name: self.of_sums(np.sum(_each(self.name, self.statistics, targets, predictions), axis=0))}


def _each(name: str, fn: Callable[..., Any], targets: Sequence[Target], predictions: Sequence[str]) -> list[Any]:
    values = [fn(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    if not values:
        raise ValueError(f"{name}: no examples to score")
    return values


def references(target: Target) -> list[str]:
    """Returns the right answers of an example as a list. Raises ValueError if there is none."""
    answers = [target] if isinstance(target, str) else list(target)
    if not answers:
        raise ValueError("an example has no right answer")
    return answers


def normalise(answer: str) -> str:
    """Returns the answer as SQuAD's script compares it: lower case, without punctuation, articles and extra space."""
    answer = "".join(c for c in answer.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", answer).split())


def _equal(target: Target, prediction: str) -> float:
    return 100.0 * (prediction in references(target))


def _squad_equal(target: Target, prediction: str) -> float:
    return 100.0 * (normalise(prediction) in map(normalise, references(target)))


def _squad_f1(target: Target, prediction: str) -> float:
    return max(_token_f1(normalise(t).split(), normalise(prediction).split()) for t in references(target))


def _token_f1(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return 100.0 * (target == prediction)
    shared = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return 200.0 * shared / (len(target) + len(prediction))


def _rouge2(target: Target, prediction: str) -> float:
    return 100.0 * max(_ROUGE.score(t, prediction)["rouge2"].fmeasure for t in references(target))


def _bleu_statistics(target: Target, prediction: str) -> list[int]:
    """Returns the matching and all n-grams (n = 1 to 4 each), and the lengths of prediction and closest reference."""
    score = _BLEU.sentence_score(prediction, references(target))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu_of_sums(sums: np.ndarray) -> float:
    *counts, length, reference_length = map(int, sums)
    bleu = BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method=_BLEU.smooth_method)
    return min(bleu.score, 100.0)  # logarithms make 100.00000000000004 of a perfect corpus


accuracy = MeanMetric("accuracy", _equal)
exact_match = MeanMetric("exact_match", _squad_equal)
token_f1 = MeanMetric("token_f1", _squad_f1)
rouge2 = MeanMetric("rouge2", _rouge2)
bleu = CorpusMetric("bleu", _bleu_statistics, _bleu_of_sums)  # sacreBLEU's defaults: 13a tokens, case sensitive
