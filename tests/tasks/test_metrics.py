import inspect
import math
import re
import string
from collections.abc import Sequence

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from promot_jax.tasks import metrics

MEANS = [metrics.accuracy, metrics.exact_match, metrics.token_f1, metrics.rouge2]


# By hand, from the rules of SQuAD's evaluate-v1.1.py.
@pytest.mark.parametrize(
    ("target", "prediction", "exact", "f1"),
    [
        ("Paris", "paris", 100.0, 100.0),
        ("The Eiffel Tower", "eiffel tower!", 100.0, 100.0),
        ("an apple", "apple", 100.0, 100.0),
        ("1,234 people", "1234 people", 100.0, 100.0),
        ("Sub-Saharan Africa", "Africa", 0.0, 200 / 3),  # "subsaharan africa": precision 1, recall 1/2
        ("the cat sat", "cat cat", 0.0, 50.0),  # one shared of two and two
        ("Paris", "", 0.0, 0.0),
        ("the", "a", 100.0, 100.0),  # nothing is left of either
        ("Rome", "Paris", 0.0, 0.0),
        (["Rome", "the city of Rome"], "city of Rome", 100.0, 100.0),
        (["Rome", "Roma"], "Roma, Italy", 0.0, 200 / 3),
    ],
)
def test_squad(target: metrics.Target, prediction: str, exact: float, f1: float) -> None:
    assert metrics.exact_match([target], [prediction]) == {"exact_match": exact}
    assert metrics.token_f1([target], [prediction])["token_f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  The U.S.A. ", "usa"),
        ("A.N. Other", "other"),  # punctuation goes first, and leaves an article
        ("theatre anthem", "theatre anthem"),
        ("half-an-hour", "halfanhour"),
        ("rock 'n' roll", "rock n roll"),
        ("the\tan\na", ""),
        ("“Æon” – é", "“æon” – é"),  # ASCII punctuation only
    ],
)
def test_squads_normalisation(answer: str, normal: str) -> None:
    assert metrics.normalise(answer) == normal


@given(st.text(alphabet="aAn the'.-,!\t\u2019\u00e9 U1", max_size=30))
def test_normalisation_goes_through_the_steps_of_squads_script(answer: str) -> None:
    """Lower case; ASCII punctuation out; articles out, as whole words; white space to single blanks: in this order."""
    bare = answer.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    words = re.split(r"\s+", re.sub(r"\b(?:a|an|the)\b", " ", bare).strip())

    assert metrics.normalise(answer) == " ".join(filter(None, words))


def test_bleu_and_rouge2_by_hand() -> None:
    target, prediction = "the cat sat on a mat", "the cat sat on the mat"

    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; of equal length, so no penalty.
    assert metrics.bleu([target], [prediction])["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    short = 100 * math.exp(1 - 6 / 5)  # 5 of 5 words right, but the target has 6
    assert metrics.bleu([target], ["the cat sat on a"])["bleu"] == pytest.approx(short)
    assert metrics.rouge2([target], [prediction]) == {"rouge2": pytest.approx(60)}  # 3 of 5 pairs, either way
    assert metrics.rouge2(["Cats sat"], ["cats sit, cats sat."])["rouge2"] == pytest.approx(50)  # 1 of 3, 1 of 1


def test_accuracy_takes_the_answer_to_the_letter() -> None:
    assert metrics.accuracy(["True", "False", "True", "True"], ["True", "True", "true", ""]) == {"accuracy": 25.0}


SENTENCES = ["The camera was not a marvel.", "It is time for us to take action.", "Are its priorities skewed?"]
OUTPUTS = ["The camera was a marvel.", "it is not time for us to take action.", "Are its priorities skewed?"]


SENTENCE = st.lists(st.sampled_from([*"abcd", "the", "Cat!", "3.5"]), max_size=9).map(" ".join)


def test_bleu_is_sacrebleus() -> None:
    expected = sacrebleu.corpus_bleu(OUTPUTS, [SENTENCES]).score

    assert 0 < expected < 100
    assert metrics.bleu(SENTENCES, OUTPUTS) == {"bleu": pytest.approx(expected)}
    assert not hasattr(metrics.bleu, "per_example")


@given(st.lists(st.tuples(st.lists(SENTENCE, min_size=1, max_size=3), SENTENCE), min_size=1, max_size=6))
def test_bleu_of_summed_statistics_is_that_of_the_corpus(pairs: list[tuple[list[str], str]]) -> None:
    targets, predictions = zip(*pairs, strict=True)
    streams = [[references[i] if i < len(references) else None for references in targets] for i in range(3)]
    expected = sacrebleu.corpus_bleu(list(predictions), streams).score

    assert metrics.bleu(targets, predictions)["bleu"] == pytest.approx(expected)


def test_a_perfect_corpus_has_bleu_100_and_no_more() -> None:
    assert sacrebleu.corpus_bleu(SENTENCES, [SENTENCES]).score > 100  # by rounding, where scores may be at most 100
    assert metrics.bleu(SENTENCES, SENTENCES) == {"bleu": 100.0}


def test_bleu_takes_unequal_numbers_of_references() -> None:
    many: list[metrics.Target] = [[SENTENCES[0], OUTPUTS[0]], SENTENCES[1], [SENTENCES[2]]]
    expected = sacrebleu.corpus_bleu(OUTPUTS, [SENTENCES, [OUTPUTS[0], None, None]]).score

    assert metrics.bleu(many, OUTPUTS)["bleu"] == pytest.approx(expected)
    assert metrics.bleu(many, OUTPUTS)["bleu"] > metrics.bleu(SENTENCES, OUTPUTS)["bleu"]


def test_rouge2_is_the_mean_f_measure_of_rouge_score() -> None:
    scorer = rouge_scorer.RougeScorer(["rouge2"])
    each = [100 * scorer.score(t, p)["rouge2"].fmeasure for t, p in zip(SENTENCES, OUTPUTS, strict=True)]

    assert metrics.rouge2(SENTENCES, OUTPUTS)["rouge2"] == pytest.approx(sum(each) / 3)
    assert metrics.rouge2([[SENTENCES[0], OUTPUTS[0]]], OUTPUTS[:1]) == {"rouge2": 100.0}


@pytest.mark.parametrize("metric", [*MEANS, metrics.bleu])
def test_seqio_recognises_the_signature(metric: object) -> None:
    assert callable(metric)
    assert list(inspect.signature(metric).parameters) == ["targets", "predictions"]


@pytest.mark.parametrize("metric", [*MEANS, metrics.bleu])
@pytest.mark.parametrize(("targets", "predictions"), [([], []), (["a"], []), (["a"], ["a", "b"]), ([[]], ["a"])])
def test_nothing_to_score(
    metric: metrics.MeanMetric | metrics.CorpusMetric, targets: Sequence[str], predictions: Sequence[str]
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  each says it its own way
        metric(targets, predictions)


WORDS = st.lists(st.sampled_from(["a", "the", "cat", "sat", "Cat!", "on"]), max_size=5).map(" ".join)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_the_score_is_the_mean_of_the_scores_per_example(pairs: list[tuple[str, str]]) -> None:
    targets, predictions = zip(*pairs, strict=True)
    for metric in MEANS:
        each = [metric.per_example(t, p) for t, p in pairs]

        assert all(0 <= score <= 100 for score in each)
        assert metric(targets, predictions) == {metric.name: pytest.approx(sum(each) / len(each))}


@given(WORDS, WORDS)
def test_token_f1_is_symmetric_and_never_below_exact_match(target: str, prediction: str) -> None:
    score = metrics.token_f1.per_example(target, prediction)

    assert score == pytest.approx(metrics.token_f1.per_example(prediction, target))
    assert score >= metrics.exact_match.per_example(target, prediction)


def _official_trivia(s: str) -> str:
    """`normalize_answer` of TriviaQA's `evaluation/triviaqa_evaluation.py`, its steps in order."""
    s = s.replace("_", " ").lower()
    exclude = set(string.punctuation + "".join(["\u2018", "\u2019", "\u00b4", "`"]))
    s = "".join(ch if ch not in exclude else " " for ch in s)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split()).strip()


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        ("Spider-Man", "Spider Man", 100.0),
        ("O\u2019Neill", "o'neill", 100.0),
        ("The_Beatles", "beatles", 100.0),
        (["Rome", "Roma"], "roma.", 100.0),
        ("1,234", "1234", 0.0),
        ("Rome", "Paris", 0.0),
    ],
)
def test_trivia_qa(target: metrics.Target, prediction: str, score: float) -> None:
    """By the rules of TriviaQA's script; SQuAD's would join `Spider-Man` to one word."""
    assert metrics.trivia_match([target], [prediction]) == {"exact_match": score}


@given(st.text(alphabet="aAn the'.-,!_`\t\u2018\u2019\u00b4\u00e9 U1", max_size=30))
def test_trivias_normalisation_is_that_of_its_script(answer: str) -> None:
    assert metrics.normalise_trivia(answer) == _official_trivia(answer)


IDENTICAL = ["今日は天気がいいです。", "今天天气很好。", "Сегодня хорошая погода", "오늘은 날씨가 좋다"]
IDENTICAL += ["आज मौसम अच्छा है", "วันนี้อากาศดี", "اليوم الطقس جميل", "é à"]
IDENTICAL += [
    "Ở đâu",
    "ăn ở",
    "à la",
    "été là",
    "æ og ø",
    "œuvre à",
    "Ő él",
    "Ï á b",
    "e\u0301te\u0301 la\u0300",
    "1 é",
]


@pytest.mark.parametrize("text", IDENTICAL)
def test_identical_text_of_any_script_is_right(text: str) -> None:
    assert metrics.rouge2([text], [text]) == {"rouge2": 100.0}
    assert metrics.rouge2([text], ["nothing of it"]) == {"rouge2": 0.0}
    assert metrics.token_f1([text], [text]) == {"token_f1": 100.0}


def test_rouge2_of_other_scripts_is_that_of_their_words() -> None:
    """The words are renamed to ASCII ones, which rouge-score's own tokenizer reads."""
    pairs = [
        ("мама мыла раму вчера", "мама мыла окно вчера", "m w r v", "m w o v"),
        ("今天天气很好", "今天很好", "j t t q h g", "j t h g"),
        ("l\u2019été là-bas", "l\u2019âme là-bas", "l e l b", "l a l b"),
        ("आज मौसम अच्छा है", "आज मौसम है", "a m c h", "a m h"),
    ]
    scorer = rouge_scorer.RougeScorer(["rouge2"])
    for target, prediction, target_words, words in pairs:
        expected = 100 * scorer.score(target_words, words)["rouge2"].fmeasure

        assert 0 < expected < 100
        assert metrics.rouge2([target], [prediction])["rouge2"] == pytest.approx(expected)


@pytest.mark.parametrize("text", ["Ja", "Ở", "好", "😀 😀", "!!!", ""])
def test_rouge2_of_texts_without_two_words_is_0_as_in_rouge_score(text: str) -> None:
    assert rouge_scorer.RougeScorer(["rouge2"]).score(text, text)["rouge2"].fmeasure == 0
    assert metrics.rouge2([text], [text]) == {"rouge2": 0.0}


@pytest.mark.parametrize("prediction", ["Das ist ein kleines 房子 am See.", "世界", "This is the façade, 1 \u00bd."])
@pytest.mark.parametrize("target", ["Das ist ein kleines Haus am See.", "This is the front \u2013 1!"])
def test_the_right_answers_choose_the_tokens(target: str, prediction: str) -> None:
    """Whatever script a prediction has; as sacreBLEU (13a), rouge-score and SQuAD's script, which splits at spaces."""
    bleu, rouge = sacrebleu.corpus_bleu([prediction], [[target]]).score, rouge_scorer.RougeScorer(["rouge2"])
    both = [metrics.normalise(text).split() for text in (target, prediction)]
    f1 = 200 * len(set(both[0]) & set(both[1])) / sum(map(len, both))  # no word comes twice

    assert metrics.bleu([target], [prediction])["bleu"] == pytest.approx(bleu)
    assert metrics.rouge2([target], [prediction])["rouge2"] == 100 * rouge.score(target, prediction)["rouge2"].fmeasure
    assert metrics.token_f1([target], [prediction])["token_f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("tokenize", "target", "prediction"),
    [
        ("zh", "今天天气很好，我们去公园。", "今天天气不好，我们去公园。"),
        ("zh", "他用 Python 3.5 写程序。", "他用 Python 3 写程序。"),
        ("char", "今日は天気がいいです", "今日の天気はいいです"),
        ("char", "วันนี้อากาศดีมาก", "วันนี้อากาศดี"),
        ("13a", "L\u2019été n\u2019est pas fini, dit-il.", "L\u2019été n\u2019est pas là, dit-il."),
        ("13a", "오늘은 날씨가 아주 좋습니다 그렇죠", "오늘은 날씨가 아주 좋습니다"),
    ],
)
def test_bleu_is_sacrebleus_with_the_tokenizer_of_the_script(tokenize: str, target: str, prediction: str) -> None:
    expected = sacrebleu.corpus_bleu([prediction], [[target]], tokenize=tokenize).score

    assert 0 < expected < 100
    assert metrics.bleu([target], [prediction])["bleu"] == pytest.approx(expected)
