"""Registers a text task or mixture with SeqIO, and its k-shot variants: the tasks here, and your own.

    from promot_jax.tasks import metrics, register, templates

    ROWS = {"train": [{"id": "1", "country": "France", "capital": "Paris"}, ...], "validation": [...], "test": [...]}
    template = templates.labelled("Country", "Capital", "country", "capital")
    register.register("my_capital", ROWS.__getitem__, template, [metrics.exact_match])

Put the module's name in `MIXTURE_OR_TASK_MODULE` and the task's in `MIXTURE_OR_TASK_NAME`.
"""

import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio
import tensorflow as tf

from promot_jax.data import examples
from promot_jax.data.files import SPLITS as SPLITS  # of every task unless it names others
from promot_jax.data.rows import Row, RowsSource
from promot_jax.errors import UserError, half_character, nearest

from . import postprocess
from .templates import Template

SHOTS = (0, 1, 4)
MetricFn = Callable[..., Mapping[str, float]]
Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


class TfdsSource(seqio.TfdsDataSource):
    """A TFDS data set, downloaded and prepared when one of its splits is first read.

    It also has the split `examples.EXEMPLARS`: the first rows of `train`, in storage order.
    """

    def __init__(self, tfds_name: str, train: str, validation: str, test: str):
        """Takes the name with version ("super_glue/rte:1.0.2"), and a TFDS split or slice for each split."""
        splits = {"train": train, "validation": validation, "test": test, examples.EXEMPLARS: train}
        super().__init__(tfds_name, splits=splits)

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of rows."""
        rows = super().num_input_examples(split)
        return min(rows, examples.POOL_ROWS) if rows and split == examples.EXEMPLARS else rows

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the files that a cache build reads in parallel; `examples.EXEMPLARS` is a single shard."""
        return [split] if split == examples.EXEMPLARS else super().list_shards(split)

    def get_dataset(self, split: str | None = None, shuffle: bool = True, **kwargs: Any) -> tf.data.Dataset:
        """Returns the rows as TFDS has them. Raises UserError if TFDS can neither read nor prepare them."""
        try:
            if split != examples.EXEMPLARS:
                return super().get_dataset(split, shuffle, **kwargs)
            with examples.in_storage_order():
                return super().get_dataset(split, shuffle=False, **kwargs).take(examples.POOL_ROWS)
        except Exception as error:  # of any kind: downloads, files to fetch by hand, missing packages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"TFDS cannot read {self.tfds_dataset.name} ({reason}): prepare it with the tfds command, and say in "
                "TFDS_DATA_DIR where it lies"
            ) from error


def register(
    name: str,
    rows: Callable[[str], Sequence[Row]] | seqio.DataSource,
    template: Template,
    metric_fns: Sequence[MetricFn],
    *,
    labels: Sequence[str] = (),
    postprocess_fn: postprocess.Postprocess | None = None,
    splits: Sequence[str] = SPLITS,
    preprocessors: Sequence[Preprocessor] = (),
) -> seqio.Task:
    """Registers the task `name`, and `<name>_0shot`, `_1shot` and `_4shot`; other shots are registered on first use.

    Args:
      name: letters, digits and underscores.
      rows: a function from a split's name to its rows, called when the split is first read; or a SeqIO source, for
        instance a `TfdsSource`. A row is a mapping from fields to texts or numbers. Its field `id` must be unique
        within the split; without the field, a hash of the row is the id.
      template: makes inputs and targets of a row.
      metric_fns: `fn(targets, predictions) -> {name: score on [0, 100]}`; the first key of the first is the task's
        score.
      labels: the label set of a classification task.
      postprocess_fn: from raw output to answer; the default is `postprocess.label` with a label set, else
        `postprocess.text`.
      splits: the splits of `rows`; a source has its own.
      preprocessors: map a source's examples to rows of scalar strings. If several answers are right, a row also has
        `answers`, strings `[answers]`.

    Raises:
      UserError: a task or mixture of that name exists, or an argument is of the wrong kind.
    """
    _check_free(name)
    _check_arguments(name, rows, template, metric_fns, labels, splits)
    default = postprocess.label(labels, template.prefix) if labels else postprocess.text(template.prefix)
    source = rows if isinstance(rows, seqio.DataSource) else RowsSource(rows, splits, name)
    if isinstance(source, RowsSource) and not preprocessors:
        source.fillers[name] = _filler(template)
    task = seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            *preprocessors,
            functools.partial(_fill, task=name, template=template, labels=tuple(labels)),
            seqio.CacheDatasetPlaceholder(),
        ],
        output_features=examples.FEATURES,
        postprocess_fn=postprocess_fn or default,
        metric_fns=list(metric_fns),
    )
    _register_shots(name)
    return task


def register_mixture(name: str, tasks: Sequence[str] | Mapping[str, float]) -> seqio.Mixture:
    """Registers a mixture of registered tasks, and its 0-shot, 1-shot and 4-shot variants.

    Args:
      name: letters, digits and underscores.
      tasks: names, mixed equally, or a mapping from names to rates.

    Raises:
      UserError: a task or mixture of that name exists, a task is unknown, or a rate is not positive and finite.
    """
    _check_free(name)
    if isinstance(tasks, str) or not tasks:
        raise UserError(f"mixture {name!r} needs a list of tasks, or a mapping from tasks to rates, not {tasks!r}.")
    rates = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    for task, rate in rates.items():
        examples.check_rate(name, task, rate)
    mixture = seqio.MixtureRegistry.add(name, [(examples.get(task).name, float(rate)) for task, rate in rates.items()])
    _register_shots(name)
    return mixture


def _check_free(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
        raise UserError(f"a task or mixture cannot be called {name!r}: use letters, digits and underscores")
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise UserError(f"a task or mixture called {name!r} is registered already: choose another name")


def _check_arguments(
    name: str, rows: Any, template: Any, metric_fns: Any, labels: Sequence[str], splits: Sequence[str]
) -> None:
    """Raises UserError for an argument of `register` that would fail, or mean something else, when it is used."""
    if not callable(rows) and not isinstance(rows, seqio.DataSource):
        raise UserError(f"the rows of task {name!r} are a {type(rows).__name__}: give a function from a split to rows")
    if not isinstance(template, Template):
        raise UserError(f"the template of task {name!r} is a {type(template).__name__}: give a templates.Template")
    try:
        pieces = [*string.Formatter().parse(template.inputs), *string.Formatter().parse(template.targets)]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the template of task {name!r} is no format string ({error}): write braces as {{{{ }}}}"
        ) from error
    for _, field, form, conversion in pieces:
        if field == "" or form or conversion:
            raise UserError(
                f"the template of task {name!r} has a field without a name or with a format: write {{name}}"
            )
    if isinstance(metric_fns, str) or not isinstance(metric_fns, Sequence) or not all(map(callable, metric_fns)):
        raise UserError(f"metric_fns of task {name!r} is {metric_fns!r}: give a list of functions")
    for key, names in {"labels": labels, "splits": splits}.items():
        if isinstance(names, str) or not all(isinstance(each, str) and each.strip() for each in names):
            raise UserError(f"{key} of task {name!r} is {names!r}: give a list of texts")
    texts = [*((f"the template's {key}", text) for key, text in vars(template).items())]
    texts += [*(("a label", label) for label in labels), *(("a split", split) for split in splits)]
    for what, text in texts:
        if problem := half_character(text):
            raise UserError(f"{what} of task {name!r}, {text!r}, {problem}")


def _register_shots(name: str) -> None:
    for k in SHOTS:
        examples.get(f"{name}_{k}shot")


def _filler(template: Template) -> Callable[[Mapping[str, str]], tuple[str, str]]:
    """What `_fill` does, of one row."""
    inputs, targets = (
        [(text, field) for text, field, *_ in string.Formatter().parse(pattern)]
        for pattern in (template.inputs, template.targets)
    )

    def fill(pieces: list[tuple[str, str | None]], row: Mapping[str, str]) -> str:
        return "".join(text + (row[field] if field else "") for text, field in pieces)

    return lambda row: (fill(inputs, row), fill(targets, row))


def _fill(data: tf.data.Dataset, task: str, template: Template, labels: tuple[str, ...]) -> tf.data.Dataset:
    """SeqIO preprocessor: maps rows to the features of `examples.FEATURES`."""
    fields = data.element_spec
    for _, field, _, _ in string.Formatter().parse(template.inputs + template.targets):
        if field and field not in fields:
            raise UserError(f"the template of task {task!r} names a field {field!r}{nearest(field, fields)}")
    several_answers = "answers" in fields and fields["answers"].shape.rank == 1

    def fill(pattern: str, row: Mapping[str, tf.Tensor]) -> tf.Tensor:
        pieces = string.Formatter().parse(pattern)  # (literal text, field that follows it or None, ...)
        return tf.strings.join([part for text, field, *_ in pieces for part in (text, row[field] if field else "")])

    def example(row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        inputs, targets = fill(template.inputs, row), fill(template.targets, row)
        # By content: an example that is stored in another file keeps its id.
        content = tf.strings.join([inputs, targets], separator="\0")
        fingerprint = tf.strings.as_string(tf.strings.to_hash_bucket_fast(content, 2**63 - 1))
        return {
            "inputs": inputs,
            "targets": targets,
            "id": row.get("id", fingerprint),
            "labels": tf.constant(labels, tf.string, [len(labels)]),
            "prefix": tf.constant(template.prefix),
            "shots": tf.constant(0, tf.int32),
            "answers": row["answers"] if several_answers else tf.constant([], tf.string),
            "suffix": tf.constant(template.suffix),
        }

    return data.map(example)
