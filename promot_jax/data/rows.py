"""Rows in memory as a SeqIO source: what a user's module of tasks gives, as text, or an error that names the row."""

import collections
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from promot_jax.data import examples
from promot_jax.data.vocabularies import controls

# isort: split
import seqio
import tensorflow as tf

from promot_jax.errors import UserError, half_character, users_code

Row = Mapping[str, str | bytes | float]
BOM = "\ufeff"  # byte order mark; editors and spreadsheets write it at the start of a file
HELD_OUT = 10  # parts of the training rows, of which one is held out for each split that is not given
R = TypeVar("R")


def hold_out(rows: Iterable[R], splits: Sequence[str], text: Callable[[R], str]) -> dict[str, list[R]]:
    """Takes a tenth of the training rows for each of `splits`, by a hash of their text: equal texts stay together.

    Returns:
        "train" and `splits`, some of them empty where there are few rows.
    """
    dealt: dict[str, list[R]] = {split: [] for split in ("train", *splits)}
    for row in rows:
        part = int(examples.stable_hash("split", text(row)), 16) % HELD_OUT
        dealt[splits[part] if part < len(splits) else "train"].append(row)
    return dealt


class RowsSource(seqio.DataSource):
    """A SeqIO source of rows in memory; they are read when a data set or a count is first needed.

    If there is a split `train`, there is also the split `examples.EXEMPLARS`, its first rows. A split is read and
    turned into text once; a read may be asked for again by each of checks, exemplars and the stream.
    """

    def __init__(
        self, rows: Callable[[str], Sequence[Row]], splits: Sequence[str], task: str = "", *, marked: bool = False
    ):
        """Prepares a source.

        Args:
            rows: from a split's name to its rows; all rows have the same fields.
            splits: names.
            task: the task's name, for messages.
            marked: whether marks of control tokens (`vocabularies.controls`) in the texts count, as in a chat's input.

        Numbers become text as a format string would write them, UTF-8 bytes are decoded, and a byte order mark at the
        start of a text is left out. Reading a split raises UserError, with task, split, row and field, for anything
        else.
        """
        super().__init__(splits=[*splits, *([examples.EXEMPLARS] if "train" in splits else [])])
        self._given, self._task, self.marked = rows, task, marked
        self._read: dict[str, list[dict[str, str]]] = {}  # by split
        # What makes input and target of a row, by task; not of those that have preprocessors of their own.
        self.fillers: dict[str, Callable[[Mapping[str, str]], tuple[str, str]]] = {}

    def _rows(self, split: str) -> list[dict[str, str]]:
        """The rows of a split as text."""
        read = "train" if split == examples.EXEMPLARS else split
        if read not in self._read:
            self._read[read] = self._texts(read)
        return self._read[read][: examples.POOL_ROWS] if split == examples.EXEMPLARS else self._read[read]

    def _texts(self, read: str) -> list[dict[str, str]]:
        where = f"split {read!r} of task {self._task!r}"
        with users_code(f"Reading {where}", advice="; give rows for each of `splits`"):
            rows = self._given(read)
            if not isinstance(rows, Iterable) or isinstance(rows, Mapping | str | bytes):
                raise UserError(f"The rows of {where} are a {type(rows).__name__}; give a list of mappings.")
            rows = list(rows)
        if not rows:
            raise UserError(f"Task {self._task!r} has no row in its split {read!r}; leave the split out of `splits`.")
        return _texts(rows, read, self._task)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: rows are sharded before they are shuffled, so that a shard has the same rows in every epoch."""
        return True

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows, for SeqIO's mixing rates by size."""
        return len(self._rows(split))

    def empty_fields(self, split: str) -> collections.Counter[str]:
        """Returns how many of a split's rows have no text in a field, by field."""
        return collections.Counter(
            field for row in self._rows(split) for field, text in row.items() if not text.strip()
        )

    def filled(self, split: str, start: int, task: str) -> Iterator[tuple[str, str, str]]:
        """Yields id, input and target of the rows from `start` on, as `examples.stored` has them, without TensorFlow.

        Nothing of a task that has preprocessors of its own.
        """
        if (fill := self.fillers.get(task)) is None:
            return
        for row in itertools.islice(self._rows(split), start, None):
            texts = fill(row)
            inputs, targets = texts if self.marked else map(controls.unmarked, texts)
            yield row["id"] if "id" in row else examples.stable_hash(*row.values()), inputs, targets

    def list_shards(self, split: str) -> list[str]:
        """Returns one shard per split."""
        return [split]

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, shard_info: Any = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the rows as a data set of string scalars, one feature per field and `id`."""
        del unused
        rows = self._rows(split)
        columns = {field: [row[field] for row in rows] for field in rows[0]}
        if "id" not in columns:
            columns["id"] = [examples.stable_hash(*row.values()) for row in rows]
        tensors = {field: tf.constant(values, tf.string, [len(rows)]) for field, values in columns.items()}
        data = tf.data.Dataset.from_tensor_slices(tensors)
        if shard_info:
            data = data.shard(shard_info.num_shards, shard_info.index)
        return data.shuffle(len(rows), seed=seed) if shuffle else data


def _texts(rows: Sequence[Row], split: str, task: str) -> list[dict[str, str]]:
    """The rows with every field as text. Raises UserError for a row that has other fields, or none that is text."""
    texts: list[dict[str, str]] = []
    for number, row in enumerate(rows, 1):
        where = f"Row {number} (the first is 1) of split {split!r} of task {task!r}"
        if not isinstance(row, Mapping) or not all(isinstance(field, str) for field in row):
            raise UserError(f"{where} is a {type(row).__name__}; give a mapping from names of fields to texts.")
        text = {field.removeprefix(BOM): _text(value, f"{where}, field {field!r},") for field, value in row.items()}
        fields = texts[0] if texts else text
        if missing := [field for field in fields if field not in text] or sorted({"id"} & text.keys() - fields.keys()):
            raise UserError(f"{where} and the first row differ: one of them has no field {missing[0]!r}.")
        texts.append(text)
    return texts


def _text(value: Any, where: str) -> str:
    """A field's value as text, without a byte order mark. Raises UserError if it is none."""
    if isinstance(value, numbers.Number | np.generic) and not isinstance(value, str | bytes):
        value = f"{value}" if value == value else None  # NaN, what tables have for a missing value
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"{where} is no UTF-8: byte 0x{byte:02x} at {error.start}; decode it in your module (Latin-1?)."
            ) from error
    if value is None:
        raise UserError(f"{where} is missing (None or NaN); give a text, or leave the row out.")
    if not isinstance(value, str):
        raise UserError(f"{where} is a {type(value).__name__}; give a text.")
    if problem := half_character(value):
        raise UserError(f"{where} {problem}.")
    return value.removeprefix(BOM)
