"""The demo's tasks: tasks to fine-tune on and ten in-context learning tasks, all on real data.

`movie_sentiment` is the fine-tuned task; `demo_icl_1shot` and `demo_icl_4shot` measure in-context learning. Nothing is
downloaded before a task is read. `demo_data` names the data's sources and licences.
"""

from collections.abc import Callable, Sequence

from . import demo_data as data
from .metrics import accuracy, bleu, exact_match, rouge2, token_f1
from .register import MetricFn, register, register_mixture
from .templates import CHOICES, READING, TRUE_FALSE_REVIEW, Template, labelled

CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
SENTIMENTS = ("positive", "negative")


def _task(
    name: str,
    splits: Callable[[], data.Splits],
    template: Template,
    metric_fns: Sequence[MetricFn],
    labels: Sequence[str] = (),
) -> None:
    register(name, lambda split: splits()[split], template, metric_fns, labels=labels)


# Tasks to fine-tune on: sentiment, translation, a choice by letter, and a second classification task for mixtures.
_task("movie_sentiment", data.movie_reviews, TRUE_FALSE_REVIEW, [accuracy], ("True", "False"))
_task("interface_enfr", data.interface_texts, labelled("English", "French", "english", "french"), [bleu])
_task("inflection_choice", data.inflection_choices, CHOICES, [accuracy], ("A", "B", "C", "D"))
_task("tweet_mood", data.tweets, labelled("Tweet", "Mood", "text", "answer"), [accuracy], ("good", "bad"))
register_mixture("movie_and_tweets", ["movie_sentiment", "tweet_mood"])

# In-context learning: knowledge.
_task("capital", data.countries, labelled("Country", "Capital", "country", "capital"), [exact_match])
_task("continent", data.countries, labelled("Country", "Continent", "country", "continent"), [accuracy], CONTINENTS)
_task("nationality", data.countries, labelled("Country", "People", "country", "nationality"), [exact_match])
# Words.
_task("past_tense", data.past_tenses, labelled("Verb", "Past", "verb", "past"), [exact_match])
_task("plural", data.plurals, labelled("Singular", "Plural", "noun", "plural"), [exact_match])
# Texts.
_task(
    "product_sentiment", data.product_reviews, labelled("Review", "Sentiment", "text", "answer"), [accuracy], SENTIMENTS
)
_task("country_reading", data.countries, READING, [token_f1, exact_match])
_task("negation", data.negations, labelled("Sentence", "Negation", "statement", "negation"), [exact_match])
_task("question", data.questions, labelled("Statement", "Question", "statement", "question"), [rouge2, exact_match])
_task("editing", data.unedited, labelled("Raw", "Edited", "raw", "edited"), [bleu])
register_mixture(
    "demo_icl",
    ["capital", "continent", "nationality", "past_tense", "plural", "product_sentiment", "country_reading", "negation",
     "question", "editing"],
)  # fmt: skip

# Half of demo_icl, for studies of many runs: two tasks with a label set, two of a word, one of a sentence.
register_mixture("study_icl", ["continent", "product_sentiment", "capital", "past_tense", "negation"])

# Generic text for replay: text that the base model may have read before it was fine-tuned.
_task("editorials", data.editorials, Template("", "{text}"), [rouge2])
