"""One pass over the rows of a run's tasks, before its model is loaded.

What would make a result wrong is an error; what a person should know of, but real data have, is a warning with counts.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio

from promot_jax.data import caches
from promot_jax.data.examples import POOL_ROWS, Example, base_task, first_rows, get, stored
from promot_jax.data.rows import RowsSource
from promot_jax.data.task_functions import judge, scores
from promot_jax.errors import UserError

JUDGED = 100  # examples of a split whose own targets are scored, as a trial of the task's metrics

Warn = Callable[[str], None]


def check(tasks: Sequence[str], trained: Sequence[str], splits: Sequence[str]) -> None:
    """Checks the rows of each split that a run reads, once per process.

    Of a `RowsSource`, which has them in memory, these are all rows, unless the task has preprocessors of its own or is
    read from a cache; of other sources the first `POOL_ROWS`.

    Warnings are printed: fields without text, empty targets, examples that are there twice, examples of an evaluation
    that are also trained on.

    Args:
        tasks: names of all tasks, no mixtures; with or without a number of shots.
        trained: those that are trained on.
        splits: those that are evaluated on, the test split last.

    Raises:
        UserError: a row that cannot be read; a split without examples; an empty input; a target outside of the task's
            labels; two examples of one id; post-processors or metrics that fail; a task that is tested on the examples
            that it is trained on. With task, split and example.
    """
    names = {base_task(name) for name in trained}
    for name in dict.fromkeys(map(base_task, tasks)):
        _check_task(get(name), tuple(dict.fromkeys(splits)), name in names)


@functools.cache
def _check_task(task: seqio.Task, splits: tuple[str, ...], trained: bool) -> None:
    def warn(text: str) -> None:
        print(f"Warning: task {task.name!r}, {text}.", flush=True)

    contents = {}
    for split in dict.fromkeys(("train", *splits)):
        rows = first_rows(task, split) if trained else stored(task, split, POOL_ROWS)
        contents[split] = _check_split(task, split, rows, warn)
    for split in splits:
        known = contents[split] & contents["train"]
        if trained and split != "train" and known == contents[split]:
            raise UserError(
                f"All examples of split {split!r} of task {task.name!r} are examples of its split 'train' too: a score "
                "on them would be of what was learnt by heart. Give other rows, or set Evaluation's splits."
            )
        if trained and known and split != "train":
            warn(f"split {split!r}: {len(known)} of {len(contents[split])} examples are in 'train' too")
    if len(splits) > 1 and (both := contents[splits[0]] & contents[splits[-1]]):
        warn(f"{len(both)} of {len(contents[splits[-1]])} examples of split {splits[-1]!r} are in {splits[0]!r} too")


def _check_split(task: seqio.Task, split: str, rows: Iterable[Example], warn: Warn) -> set[int]:
    """Checks the examples `rows` of a split, and those after them in memory; returns hashes of what they say."""
    if isinstance(task.source, RowsSource):
        for field, count in task.source.empty_fields(split).items():
            warn(f"split {split!r}: {count} rows have no text in field {field!r}")
    seen, last = _Seen(task, split), None
    judged: list[tuple[object, object]] = []
    for last in rows:
        seen.add(last.id, last.inputs, last.targets, last)
        if len(judged) < JUDGED:
            judge(task, last, "")
            judged.append(judge(task, last, last.targets)[:2])
    if last is None:
        raise UserError(f"Task {task.name!r} has no example in its split {split!r}.")
    if isinstance(task.source, RowsSource) and not caches.used(task):
        for example_id, inputs, targets in task.source.filled(split, seen.count, base_task(task.name)):
            seen.add(example_id, inputs, targets, last)
    if split != "train" and len({str(target) for target, _ in judged}) > 1:  # a correlation of equal targets is none
        scores(task, *zip(*judged, strict=True))
    seen.warn(warn)
    return {content for _, content in seen.first.values()}


@dataclasses.dataclass
class _Seen:
    """The examples of a split so far."""

    task: seqio.Task
    split: str
    first: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # by id: number, hash of the texts
    count: int = 0
    repeated: int = 0
    empty: int = 0
    shared: int = 0

    def add(self, example_id: str, inputs: str, targets: str, like: Example) -> None:
        """Checks an example; `like` is another of its task, or itself, and has what all of them share."""
        self.count += 1
        if not inputs.strip():
            raise UserError(f"The input of {self._where(example_id)} is empty; leave the row out.")
        self.empty += not targets.strip()
        if like.labels:
            labels = _stripped(like.labels)
            if "" in labels:
                raise UserError(f"A label of {self._where(example_id)} is empty; leave it out of the task's labels.")
            if targets.strip() not in labels:
                self._check_label(dataclasses.replace(like, id=example_id, inputs=inputs, targets=targets), labels)
        content = hash((inputs, targets))
        before, same = self.first.setdefault(example_id, (self.count, content))
        if same != content and self.split != "train":  # whose ids order exemplars only
            where = self._where(example_id)
            raise UserError(f"The id of {where} is that of example {before} too; an id has to be unique.")
        self.shared += same != content
        self.repeated += same == content and before != self.count

    def _check_label(self, example: Example, labels: Collection[str]) -> None:
        """Raises UserError for a target that no output can match: outputs become labels, or stay what they are."""
        if judge(self.task, example, example.targets)[0] not in labels:
            where = self._where(example.id)
            raise UserError(
                f"The target of {where} is {example.targets!r}, which is none of the labels {sorted(labels)}."
            )

    def warn(self, warn: Warn) -> None:
        """Says how many examples are not as they should be."""
        if self.shared:
            warn(f"split {self.split!r}: {self.shared} examples have the id of another one")
        if self.empty:
            warn(f"split {self.split!r}: {self.empty} examples have an empty target")
        if self.repeated:
            what = "examples are there before, with the same id, input and target"
            warn(f"split {self.split!r}: {self.repeated} {what}")

    def _where(self, example_id: str) -> str:
        place = f"example {self.count} (the first is 1, id {example_id!r})"
        return f"{place} of split {self.split!r} of task {self.task.name!r}"


@functools.cache
def _stripped(labels: tuple[str, ...]) -> frozenset[str]:
    return frozenset(label.strip() for label in labels)
