"""The demonstration: one fine-tuning task and a battery of ten in-context learning tasks, all on real data.

`movie_sentiment` is what a model is fine-tuned on; `demo_icl_1shot` and `demo_icl_4shot` measure what it can still do
in context. Nothing is downloaded before a task is read. Where the data come from and under which licence: `demo_data`.
"""

from . import demo_data as data
from .metrics import accuracy, bleu, exact_match, rouge2, token_f1
from .register import register, register_mixture
from .templates import READING, TRUE_FALSE_REVIEW, Template, labelled

CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
SENTIMENTS = ("positive", "negative")

register(
    "movie_sentiment",
    lambda split: data.movie_reviews()[split],
    TRUE_FALSE_REVIEW,
    [accuracy],
    labels=("True", "False"),
)
# Another kind of task to train on: translation.
register(
    "interface_enfr",
    lambda split: data.interface_texts()[split],
    labelled("English", "French", "english", "french"),
    [bleu],
)
# A second task with labels to train on, for mixtures.
register(
    "tweet_mood",
    lambda split: data.tweets()[split],
    labelled("Tweet", "Mood", "text", "answer"),
    [accuracy],
    labels=("good", "bad"),
)
register_mixture("movie_and_tweets", ["movie_sentiment", "tweet_mood"])

# Knowledge.
register(
    "capital",
    lambda split: data.countries()[split],
    labelled("Country", "Capital", "country", "capital"),
    [exact_match],
)
register(
    "continent",
    lambda split: data.countries()[split],
    labelled("Country", "Continent", "country", "continent"),
    [accuracy],
    labels=CONTINENTS,
)
register(
    "nationality",
    lambda split: data.countries()[split],
    labelled("Country", "People", "country", "nationality"),
    [exact_match],
)
# Words.
register("past_tense", lambda split: data.past_tenses()[split], labelled("Verb", "Past", "verb", "past"), [exact_match])
register("plural", lambda split: data.plurals()[split], labelled("Singular", "Plural", "noun", "plural"), [exact_match])
# Texts.
register(
    "product_sentiment",
    lambda split: data.product_reviews()[split],
    labelled("Review", "Sentiment", "text", "answer"),
    [accuracy],
    labels=SENTIMENTS,
)
register("country_reading", lambda split: data.countries()[split], READING, [token_f1, exact_match])
register(
    "negation",
    lambda split: data.negations()[split],
    labelled("Sentence", "Negation", "statement", "negation"),
    [exact_match],
)
register(
    "question",
    lambda split: data.questions()[split],
    labelled("Statement", "Question", "statement", "question"),
    [rouge2, exact_match],
)
register(
    "editing",
    lambda split: data.unedited()[split],
    labelled("Raw", "Edited", "raw", "edited"),
    [bleu],
)

# Generic text, for replay: what the base model may have read before it was fine-tuned.
register("editorials", lambda split: data.editorials()[split], Template("", "{text}"), [rouge2])

register_mixture(
    "demo_icl",
    [
        "capital",
        "continent",
        "nationality",
        "past_tense",
        "plural",
        "product_sentiment",
        "country_reading",
        "negation",
        "question",
        "editing",
    ],
)
