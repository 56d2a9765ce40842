"""The paper's tasks on TFDS: four to fine-tune on, eight for in-context learning (paper, section 4 and table 7).

Fine-tuning: `rte`, `snli`, `openbookqa`, `wmt14_enfr`, and the mixture `rte_enfr`. In-context learning: the mixture
`icl` of `cb`, `wic`, `trivia_qa`, `web_questions`, `wmt16_ende`, `wmt16_enro`, `xsum`, `wiki_lingua`. The suffix
`_1shot` or `_4shot` (or any other number) adds exemplars to any of them: models are evaluated on `icl_4shot`, and
fine-tuning on `rte_1shot` is the paper's "+ 1-shot".

`docs/paper.md` explains splits, exemplars and lengths: `test` is the split of the paper's results, `validation` is
disjoint from it, and exemplars are among the first `examples.POOL_ROWS` rows of `train`. Nothing is read at import;
TFDS downloads and prepares a data set when one of its splits is first read, with the same order of rows everywhere.
"""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from . import templates
from .metrics import accuracy, bleu, exact_match, rouge2, trivia_match
from .postprocess import label
from .register import MetricFn, TfdsSource, register, register_mixture
from .templates import Template

Row = Mapping[str, tf.Tensor]
Fields = Callable[[Row], Row]

OWN_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
LAST_TENTH = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}  # no split to spare for validation
DEV_AS_TEST = LAST_TENTH | {"test": "validation"}


def _classification(
    name: str,
    dataset: str,
    splits: Mapping[str, str],
    template: Template,
    classes: Sequence[str],
    fields: Fields,
    key: str = "label",
) -> None:
    """Registers a task with a label set.

    Args:
      name: of the task.
      dataset: TFDS name with version.
      splits: TFDS split of each split.
      template: over the fields and `answer`.
      classes: the answers, in the order of the data's class numbers.
      fields: maps a row to the template's fields.
      key: feature of the class number. Rows with -1, which have no class, are left out.
    """

    def preprocess(data: tf.data.Dataset) -> tf.data.Dataset:
        answers = tf.constant(list(classes))
        labelled = data.filter(lambda row: row[key] >= 0)
        return labelled.map(lambda row: {**fields(row), "answer": tf.gather(answers, row[key])})

    # Case counts, as the paper compares the first output token.
    postprocess = label(classes, template.prefix, ignore_case=False)
    source = TfdsSource(dataset, **splits)
    register(name, source, template, [accuracy], labels=classes, postprocess_fn=postprocess, preprocessors=[preprocess])


def _open(
    name: str, dataset: str, splits: Mapping[str, str], template: Template, metric_fn: MetricFn, fields: Fields
) -> None:
    """Registers a task without a label set; `fields` maps a row to the template's fields, and `answers` if several."""
    source = TfdsSource(dataset, **splits)
    register(name, source, template, [metric_fn], preprocessors=[lambda data: data.map(fields)])


def _renamed(**features: str) -> Fields:
    """Returns a function from a row to the named fields: field -> feature."""
    return lambda row: {field: row[feature] for field, feature in features.items()}


_PAIR = _renamed(premise="premise", hypothesis="hypothesis")
_SENSES = _renamed(word="word", sentence1="sentence1", sentence2="sentence2")


def _choices(row: Row) -> Row:
    question = row["question"]
    return {"question": question["stem"], **{letter: question[f"choice_{letter.upper()}"] for letter in "abcd"}}


def _trivia(row: Row) -> Row:
    """The value is the target; every alias is right."""
    answer = row["answer"]
    answers = tf.concat([answer["value"][tf.newaxis], answer["aliases"]], axis=0)
    return {"question": row["question"], "answer": answer["value"], "answers": answers}


def _web_question(row: Row) -> Row:
    """The first answer is the target; every answer is right."""
    return {"question": row["question"], "answer": row["answers"][0], "answers": row["answers"]}


def _translation(name: str, dataset: str, language: str, code: str) -> None:
    """Registers a translation task from English."""
    template = templates.translation("English", language)
    _open(name, dataset, OWN_SPLITS, template, bleu, _renamed(source="en", target=code))


# Fine-tuning.
_classification(
    "rte", "super_glue/rte:1.0.2", DEV_AS_TEST, templates.TRUE_FALSE,
    ("True", "False"),  # entailment, not_entailment
    _PAIR,
)  # fmt: skip
_classification(
    "snli", "snli:1.1.0", OWN_SPLITS, templates.TRUE_FALSE_NEITHER,
    ("True", "Neither", "False"),  # entailment, neutral, contradiction; -1 if the annotators disagreed
    _PAIR,
)  # fmt: skip
_classification(
    "openbookqa", "openbookqa:0.1.0", OWN_SPLITS, templates.CHOICES, ("A", "B", "C", "D"), _choices, "answerKey"
)
_translation("wmt14_enfr", "wmt14_translate/fr-en:1.0.0", "French", "fr")
register_mixture("rte_enfr", ["rte", "wmt14_enfr"])

# In-context learning.
_classification(
    "cb", "super_glue/cb:1.0.2", DEV_AS_TEST, templates.TRUE_FALSE_NEITHER,
    ("True", "False", "Neither"),  # entailment, contradiction, neutral
    _PAIR,
)  # fmt: skip
_classification("wic", "super_glue/wic:1.0.2", DEV_AS_TEST, templates.SAME_SENSE, ("False", "True"), _SENSES)
_open("trivia_qa", "trivia_qa/rc.nocontext:1.1.0", DEV_AS_TEST, templates.QUESTION, trivia_match, _trivia)
_open("web_questions", "web_questions:1.0.0", LAST_TENTH, templates.QUESTION, exact_match, _web_question)
_translation("wmt16_ende", "wmt16_translate/de-en:1.0.0", "German", "de")
_translation("wmt16_enro", "wmt16_translate/ro-en:1.0.0", "Romanian", "ro")
_open("xsum", "xsum:1.1.0", OWN_SPLITS, templates.SUMMARY, rouge2, _renamed(article="document", summary="summary"))
_open(
    "wiki_lingua", "gem/wiki_lingua_english_en:1.1.0", OWN_SPLITS, templates.SUMMARY, rouge2,
    _renamed(article="source", summary="target"),
)  # fmt: skip
register_mixture("icl", ["cb", "wic", "trivia_qa", "web_questions", "wmt16_ende", "wmt16_enro", "xsum", "wiki_lingua"])
