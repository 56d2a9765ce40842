"""The paper's tasks on TFDS: four to fine-tune on, eight to ask in context (its section 4 and table 7).

Fine-tuning: `rte`, `snli`, `openbookqa`, `wmt14_enfr`, and `rte_enfr`, the mixture of two. In context: the mixture
`icl` of `cb`, `wic`, `trivia_qa`, `web_questions`, `wmt16_ende`, `wmt16_enro`, `xsum`, `wiki_lingua`. Behind every name
`_1shot` and `_4shot` (or any other number) asks for exemplars: `icl_4shot` is what a model is evaluated on, and
fine-tuning on `rte_1shot` is the paper's "+ 1-shot". `docs/paper.md` is the table of all this.

Nothing is read at import; TFDS downloads and prepares a data set when one of its splits is first read.

Splits. `test` is what the paper reports on: the dev set of SuperGLUE tasks, the test set of the others; for TriviaQA,
whose test answers are not public, the dev set. `validation`, on which checkpoints are chosen, is disjoint from it: the
data's own one, or where there is none left (SuperGLUE, TriviaQA, WebQuestions) the last 10 % of the training rows,
which are then not trained on; TFDS has shuffled the rows when it prepared them, the same way everywhere.

Exemplars come from the first `examples.POOL_ROWS` = 10,000 rows of `train` (WMT14 En-Fr has 15.8 million)
in the order that TFDS stores them in, which does not depend on the number of files.

Articles to summarise may be longer than a prompt: then the article loses its end. The paper's 1,024 tokens are
`Evaluation.max_input_length = 1024`, the default. It counts the whole prompt: exemplars that do not fit beside the
article are dropped first, and counted. All other inputs stay whole; a limit too low for one is an error.
"""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from . import templates
from .metrics import accuracy, bleu, exact_match, rouge2
from .postprocess import label
from .register import MetricFn, TfdsSource, register, register_mixture
from .templates import Template

Row = Mapping[str, tf.Tensor]

LAST_TENTH = {"train": "train[:90%]", "validation": "train[90%:]"}  # held out of training
ITS_OWN = {"train": "train", "validation": "validation", "test": "test"}


def _classification(
    name: str, source: TfdsSource, template: Template, classes: Sequence[str], fields: Callable[[Row], Row], key: str
) -> None:
    """Registers a task with a label set.

    Args:
      name: of the task.
      source: of its rows.
      template: over the fields and `answer`.
      classes: what to answer, in the order of the data's class numbers.
      fields: from a row to the template's fields.
      key: the feature that holds the class number, -1 where there is none: such rows are left out.
    """

    def preprocess(data: tf.data.Dataset) -> tf.data.Dataset:
        answers = tf.constant(list(classes))
        labelled = data.filter(lambda row: row[key] >= 0)
        return labelled.map(lambda row: {**fields(row), "answer": tf.gather(answers, row[key])})

    register(
        name,
        source,
        template,
        [accuracy],
        labels=classes,
        # To the letter, as the paper compares the first output token.
        postprocess_fn=label(classes, template.prefix, ignore_case=False),
        preprocessors=[preprocess],
    )


def _open(
    name: str, source: TfdsSource, template: Template, metric_fns: Sequence[MetricFn], fields: Callable[[Row], Row]
) -> None:
    """Registers a task without a label set; `fields` makes the template's fields (and `answers`) of a row."""
    register(name, source, template, metric_fns, preprocessors=[lambda data: data.map(fields)])


def _pair(row: Row) -> Row:
    return {"premise": row["premise"], "hypothesis": row["hypothesis"]}


def _senses(row: Row) -> Row:
    return {field: row[field] for field in ("word", "sentence1", "sentence2")}


def _choices(row: Row) -> Row:
    asked = row["question"]
    return {"question": asked["stem"], **{letter: asked[f"choice_{letter.upper()}"] for letter in "abcd"}}


def _trivia(row: Row) -> Row:
    """The value is the target, every alias is right."""
    answer = row["answer"]
    answers = tf.concat([answer["value"][tf.newaxis], answer["aliases"]], axis=0)
    return {"question": row["question"], "answer": answer["value"], "answers": answers}


def _web_question(row: Row) -> Row:
    """The first answer is the target, every one is right."""
    return {"question": row["question"], "answer": row["answers"][0], "answers": row["answers"]}


def _from_english(language: str) -> Callable[[Row], Row]:
    return lambda row: {"source": row["en"], "target": row[language]}


# To fine-tune on.
_classification(
    "rte",
    TfdsSource("super_glue/rte:1.0.2", **LAST_TENTH, test="validation"),
    templates.TRUE_FALSE,
    ("True", "False"),  # entailment, not_entailment
    _pair,
    "label",
)
_classification(
    "snli",
    TfdsSource("snli:1.1.0", **ITS_OWN),
    templates.TRUE_FALSE_NEITHER,
    ("True", "Neither", "False"),  # entailment, neutral, contradiction; -1 where the annotators disagreed
    _pair,
    "label",
)
_classification(
    "openbookqa",
    TfdsSource("openbookqa:0.1.0", **ITS_OWN),
    templates.CHOICES,
    ("A", "B", "C", "D"),
    _choices,
    "answerKey",
)
_open(
    "wmt14_enfr",
    TfdsSource("wmt14_translate/fr-en:1.0.0", **ITS_OWN),
    templates.translation("English", "French"),
    [bleu],
    _from_english("fr"),
)
register_mixture("rte_enfr", ["rte", "wmt14_enfr"])

# To ask in context.
_classification(
    "cb",
    TfdsSource("super_glue/cb:1.0.2", **LAST_TENTH, test="validation"),
    templates.TRUE_FALSE_NEITHER,
    ("True", "False", "Neither"),  # entailment, contradiction, neutral
    _pair,
    "label",
)
_classification(
    "wic",
    TfdsSource("super_glue/wic:1.0.2", **LAST_TENTH, test="validation"),
    templates.SAME_SENSE,
    ("False", "True"),
    _senses,
    "label",
)
_open(
    "trivia_qa",
    TfdsSource("trivia_qa/rc.nocontext:1.1.0", **LAST_TENTH, test="validation"),
    templates.QUESTION,
    [exact_match],
    _trivia,
)
_open(
    "web_questions",
    TfdsSource("web_questions:1.0.0", **LAST_TENTH, test="test"),
    templates.QUESTION,
    [exact_match],
    _web_question,
)
_open(
    "wmt16_ende",
    TfdsSource("wmt16_translate/de-en:1.0.0", **ITS_OWN),
    templates.translation("English", "German"),
    [bleu],
    _from_english("de"),
)
_open(
    "wmt16_enro",
    TfdsSource("wmt16_translate/ro-en:1.0.0", **ITS_OWN),
    templates.translation("English", "Romanian"),
    [bleu],
    _from_english("ro"),
)
_open(
    "xsum",
    TfdsSource("xsum:1.1.0", **ITS_OWN),
    templates.SUMMARY,
    [rouge2],
    lambda row: {"article": row["document"], "summary": row["summary"]},
)
_open(
    "wiki_lingua",
    TfdsSource("gem/wiki_lingua_english_en:1.1.0", **ITS_OWN),
    templates.SUMMARY,
    [rouge2],
    lambda row: {"article": row["source"], "summary": row["target"]},
)
register_mixture("icl", ["cb", "wic", "trivia_qa", "web_questions", "wmt16_ende", "wmt16_enro", "xsum", "wiki_lingua"])
