"""Scores of post-processed text, in SeqIO's form `fn(targets, predictions) -> {name: score}`, all on [0, 100].

A target is a string, or a list of strings where several answers are right; the best match counts. Metrics that are a
mean over examples carry `per_example(target, prediction)`, so that a bootstrap can resample; corpus BLEU has none.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sacrebleu
from rouge_score import rouge_scorer

Target = str | Sequence[str]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_ROUGE = rouge_scorer.RougeScorer(["rouge2"])


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


accuracy = MeanMetric("accuracy", _equal)
exact_match = MeanMetric("exact_match", _squad_equal)
token_f1 = MeanMetric("token_f1", _squad_f1)
rouge2 = MeanMetric("rouge2", _rouge2)


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Returns corpus BLEU as sacreBLEU computes it by default (13a tokens, case sensitive).

    Raises:
      ValueError: when there is nothing to score, or the lengths differ.
    """
    answers = [references(target) for target in targets]
    if not answers or len(answers) != len(predictions):
        raise ValueError(f"bleu: {len(answers)} targets and {len(predictions)} predictions")
    # sacreBLEU wants one list per reference position; examples with fewer references are filled with None.
    most = max(map(len, answers))
    streams: list[Any] = [[a[i] if i < len(a) else None for a in answers] for i in range(most)]
    # A perfect corpus comes out as 100.00000000000004, through logarithms.
    return {"bleu": min(sacrebleu.corpus_bleu(list(predictions), streams).score, 100.0)}
