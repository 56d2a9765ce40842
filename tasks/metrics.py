"""Metrics of post-processed text, in SeqIO's form `fn(targets, predictions) -> {name: score}`, all on [0, 100].

A target is a string, or a list of strings if several answers are right; the best match counts. Each metric also gives
the statistics of single examples, for the bootstrap (`promot_jax.results.bootstrap`).
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rouge_score import rouge_scorer, tokenizers
from sacrebleu.metrics import BLEU

Target = str | Sequence[str]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_TRIVIA_PUNCTUATION = re.compile("[" + re.escape(string.punctuation) + "\u2018\u2019\u00b4`]")  # curly quotes, accent
_BLEU = BLEU(effective_order=True)  # avoids a warning about sentence scores; only their counts are used
# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, Chinese and Japanese with their punctuation.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef"
    "\U00020000-\U000323af]"
)


def _spaced(text: str) -> str:
    """The text with spaces around each character of a script that has none between words; other text stays as it is."""
    return _SPACELESS.sub(r" \g<0> ", text)


def _spacing(answers: Iterable[str]) -> Callable[[str], str]:
    """How right answers, and a prediction beside them, are cut: by the script of the answers alone."""
    return _spaced if any(map(_SPACELESS.search, answers)) else str


class _Words(tokenizers.Tokenizer):
    """Words of any script, for ROUGE: runs of letters, digits and marks; single characters where `_spaced` cuts."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the lower-case words of a text."""
        plain = _spaced(unicodedata.normalize("NFKC", text).lower())
        return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in plain).split()


_ROUGE = rouge_scorer.RougeScorer(["rouge2"])
_ROUGE_OF_WORDS = rouge_scorer.RougeScorer(["rouge2"], tokenizer=_Words())


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


def normalise_trivia(answer: str) -> str:
    """Returns the answer as TriviaQA's script compares it: as SQuAD's, with spaces in the place of punctuation.

    Curly quotes and accents count as punctuation (`triviaqa_evaluation.py`).
    """
    return " ".join(_ARTICLES.sub(" ", _TRIVIA_PUNCTUATION.sub(" ", answer.lower())).split())


def _equal(target: Target, prediction: str) -> float:
    return 100.0 * (prediction in references(target))


def _squad_equal(target: Target, prediction: str) -> float:
    return 100.0 * (normalise(prediction) in map(normalise, references(target)))


def _trivia_equal(target: Target, prediction: str) -> float:
    return 100.0 * (normalise_trivia(prediction) in map(normalise_trivia, references(target)))


def _squad_f1(target: Target, prediction: str) -> float:
    def score(answer: str) -> float:
        cut = _spacing([answer])
        return _token_f1(cut(normalise(answer)).split(), cut(normalise(prediction)).split())

    return max(map(score, references(target)))


def _token_f1(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return 100.0 * (target == prediction)
    shared = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return 200.0 * shared / (len(target) + len(prediction))


def _rouge2(target: Target, prediction: str) -> float:
    return 100.0 * max(_rouge(t).score(t, prediction)["rouge2"].fmeasure for t in references(target))


def _rouge(target: str) -> rouge_scorer.RougeScorer:
    """The scorer for a target: by rouge-score's own tokens, which are ASCII, if it is Latin and has two of them.

    Published scores drop accented letters in the same way. Either way a text of fewer than two words has no pair and
    scores 0, against itself too.
    """
    latin = all(c.isascii() or not c.isalpha() or unicodedata.name(c, "").startswith("LATIN") for c in target)
    return _ROUGE if latin and len(re.findall("[a-z0-9]+", target.lower())) > 1 else _ROUGE_OF_WORDS


def _bleu_statistics(target: Target, prediction: str) -> list[int]:
    """Returns the matching and all n-grams (n = 1 to 4 each), and the lengths of prediction and closest reference."""
    answers = references(target)
    cut = _spacing(answers)
    score = _BLEU.sentence_score(cut(prediction), list(map(cut, answers)))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu_of_sums(sums: np.ndarray) -> float:
    *counts, length, reference_length = map(int, sums)
    bleu = BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method=_BLEU.smooth_method)
    return min(bleu.score, 100.0)  # logarithms make 100.00000000000004 of a perfect corpus


accuracy = MeanMetric("accuracy", _equal)
exact_match = MeanMetric("exact_match", _squad_equal)
trivia_match = MeanMetric("exact_match", _trivia_equal)
token_f1 = MeanMetric("token_f1", _squad_f1)
rouge2 = MeanMetric("rouge2", _rouge2)  # rouge-score's F measure; texts of one word score 0, as there
bleu = CorpusMetric("bleu", _bleu_statistics, _bleu_of_sums)  # sacreBLEU's 13a tokens, case sensitive
