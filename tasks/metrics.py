"""Scores of post-processed text, in SeqIO's form `fn(targets, predictions) -> {name: score}`, all on [0, 100].

A target is a string, or a list of strings where several answers are right; the best match counts. For the bootstrap
(`promot_jax.analysis.bootstrap`), a metric carries what it needs of each example.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

Target = str | Sequence[str]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_ROUGE = rouge_scorer.RougeScorer(["rouge2"])
_BLEU = BLEU(effective_order=True)  # spares a warning about scores of sentences, of which only the counts are used


@dataclass(frozen=True)
class MeanMetric:
    """A metric that is the mean of a score per example.

    Attributes:
      name: the key of the score.
      per_example: (target, prediction) -> score on [0, 100].
    """

    name: str
    per_example: Callable[[Target, str], float]

    def __call__(self, targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
        """Returns the mean score. Raises ValueError when there is nothing to score, or the lengths differ."""
        scores = [self.per_example(t, p) for t, p in zip(targets, predictions, strict=True)]
        if not scores:
            raise ValueError(f"{self.name}: no examples to score")
        return {self.name: sum(scores) / len(scores)}


@dataclass(frozen=True)
class CorpusMetric:
    """A metric of all examples together, computed from the sums of numbers that each example has.

    Attributes:
      name: the key of the score.
      statistics: (target, prediction) -> numbers of one example, equally many for each.
      of_sums: their sums over examples -> score on [0, 100].
    """

    name: str
    statistics: Callable[[Target, str], Sequence[float]]
    of_sums: Callable[[np.ndarray], float]

    def __call__(self, targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
        """Returns the score. Raises ValueError when there is nothing to score, or the lengths differ."""
        statistics = [self.statistics(t, p) for t, p in zip(targets, predictions, strict=True)]
        if not statistics:
            raise ValueError(f"{self.name}: no examples to score")
        return {self.name: self.of_sums(np.sum(statistics, axis=0))}


def references(target: Target) -> list[str]:
    """Returns the right answers of one example as a list. Raises ValueError when there is none."""
    answers = [target] if isinstance(target, str) else list(target)
    if not answers:
        raise ValueError("an example has no right answer")
    return answers


def normalise(answer: str) -> str:
    """Returns the answer as SQuAD's script compares it: lower case, without punctuation, articles, extra space."""
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
    """Counts of right and of all n-grams (n = 1 to 4 each), length of the prediction and of the closest reference."""
    score = _BLEU.sentence_score(prediction, references(target))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu_of_sums(sums: np.ndarray) -> float:
    *counts, length, wanted = map(int, sums)
    score = BLEU.compute_bleu(counts[:4], counts[4:], length, wanted, smooth_method=_BLEU.smooth_method).score
    return min(score, 100.0)  # a perfect corpus comes out as 100.00000000000004, through logarithms


accuracy = MeanMetric("accuracy", _equal)
exact_match = MeanMetric("exact_match", _squad_equal)
token_f1 = MeanMetric("token_f1", _squad_f1)
rouge2 = MeanMetric("rouge2", _rouge2)
bleu = CorpusMetric("bleu", _bleu_statistics, _bleu_of_sums)  # sacreBLEU's by default: 13a tokens, case sensitive
