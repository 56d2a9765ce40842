"""Registers a text task or mixture with SeqIO, and its k-shot variants: the tasks here, and your own.

    from promot_jax.tasks import metrics, register, templates

    ROWS = {"train": [{"id": "1", "country": "France", "capital": "Paris"}, ...], "validation": [...], "test": [...]}
    template = templates.labelled("Country", "Capital", "country", "capital")
    register.register("my_capital", ROWS.__getitem__, template, [metrics.exact_match])

Put the module's name in `MIXTURE_OR_TASK_MODULE` and the task's in `MIXTURE_OR_TASK_NAME`.
"""

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio
import tensorflow as tf

from promot_jax.data import examples
from promot_jax.errors import UserError, nearest

from . import postprocess
from .templates import Template

SPLITS = ("train", "validation", "test")
SHOTS = (0, 1, 4)
Row = Mapping[str, str]
MetricFn = Callable[..., Mapping[str, float]]
Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


class RowsSource(seqio.DataSource):
    """A SeqIO source of rows in memory; they are read when a data set or a count is first needed.

    If there is a split `train`, there is also the split `examples.EXEMPLARS`, its first rows.
    """

    def __init__(self, rows: Callable[[str], Sequence[Row]], splits: Sequence[str]):
        """Takes `rows`, a function from a split's name to its rows; all rows have the same string fields."""
        super().__init__(splits=[*splits, *([examples.EXEMPLARS] if "train" in splits else [])])
        self._rows = lambda split: rows("train")[: examples.POOL_ROWS] if split == examples.EXEMPLARS else rows(split)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: rows are sharded before they are shuffled, so that a shard has the same rows in every epoch."""
        return True

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows, for SeqIO's mixing rates by size."""
        return len(self._rows(split))

    def list_shards(self, split: str) -> list[str]:
        """Returns one shard per split."""
        return [split]

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, shard_info: Any = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the rows as a data set of string scalars, one feature per field and `id`."""
        del unused
        rows = self._rows(split)
        columns = {field: [row[field] for row in rows] for field in (rows[0] if rows else ())}
        columns.setdefault("id", [examples.stable_hash(*row.values()) for row in rows])
        tensors = {field: tf.constant(values, tf.string, [len(rows)]) for field, values in columns.items()}
        data = tf.data.Dataset.from_tensor_slices(tensors)
        if shard_info:
            data = data.shard(shard_info.num_shards, shard_info.index)
        return data.shuffle(max(len(rows), 1), seed=seed) if shuffle else data


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
        instance a `TfdsSource`. A row is a mapping of strings. Its field `id` must be unique within the task; without
        the field, a hash of the row is the id.
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
      UserError: a task or mixture of that name exists.
    """
    _check_free(name)
    default = postprocess.label(labels, template.prefix) if labels else postprocess.text(template.prefix)
    task = seqio.TaskRegistry.add(
        name,
        source=rows if isinstance(rows, seqio.DataSource) else RowsSource(rows, splits),
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
      UserError: a task or mixture of that name exists, or a task is unknown.
    """
    _check_free(name)
    rates = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    mixture = seqio.MixtureRegistry.add(name, [(examples.get(task).name, float(rate)) for task, rate in rates.items()])
    _register_shots(name)
    return mixture


def _check_free(name: str) -> None:
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise UserError(f"a task or mixture called {name!r} is registered already: choose another name")


def _register_shots(name: str) -> None:
    for k in SHOTS:
        examples.get(f"{name}_{k}shot")


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
