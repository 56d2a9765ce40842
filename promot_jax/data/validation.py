"""One pass over the rows of a run's tasks, before its model is loaded.

What would make a result wrong is an error; what a person should know of, but real data have, is a warning with counts.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio

from promot_jax.data.examples import POOL_ROWS, Example, base_task, first_rows, get, stored
from promot_jax.data.rows import RowsSource
from promot_jax.data.task_functions import judge, scores
from promot_jax.errors import UserError

JUDGED = 100  # examples of a split whose own targets are scored, as a trial of the task's metrics

Warn = Callable[[str], None]


def check(tasks: Sequence[str], trained: Sequence[str], splits: Sequence[str]) -> None:
    """Reads the first `POOL_ROWS` rows of each split that a run reads, once per process, and checks them.

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


def _check_split(task: seqio.Task, split: str, rows: Iterable[Example], warn: Warn) -> set[tuple[str, str]]:
    """Checks the examples `rows` of a split; returns their inputs and targets."""
    if isinstance(task.source, RowsSource):
        for field, count in task.source.empty_fields(split).items():
            warn(f"split {split!r}: {count} rows have no text in field {field!r}")
    first: dict[str, tuple[int, Example]] = {}  # by id
    repeated = empty = shared = 0
    judged: list[tuple[object, object]] = []
    for number, example in enumerate(rows, 1):
        where = f"example {number} (the first is 1, id {example.id!r}) of split {split!r} of task {task.name!r}"
        if not example.inputs.strip():
            raise UserError(f"The input of {where} is empty; leave the row out.")
        empty += not example.targets.strip()
        if example.labels:
            _check_label(task, example, where)
        before, same = first.setdefault(example.id, (number, example))
        equal = (same.inputs, same.targets) == (example.inputs, example.targets)
        if not equal and split != "train":  # whose ids order exemplars only
            raise UserError(f"The id of {where} is that of example {before} too; an id has to be unique.")
        shared += not equal
        repeated += equal and before != number
        if len(judged) < JUDGED:
            judge(task, example, "")
            judged.append(judge(task, example, example.targets)[:2])
    if not first:
        raise UserError(f"Task {task.name!r} has no example in its split {split!r}.")
    if split != "train" and len({str(target) for target, _ in judged}) > 1:  # a correlation of equal targets is none
        scores(task, *zip(*judged, strict=True))
    if shared:
        warn(f"split {split!r}: {shared} examples have the id of another one")
    if empty:
        warn(f"split {split!r}: {empty} examples have an empty target")
    if repeated:
        warn(f"split {split!r}: {repeated} examples are there before, with the same id, input and target")
    return {(example.inputs, example.targets) for _, example in first.values()}


def _check_label(task: seqio.Task, example: Example, where: str) -> None:
    """Raises UserError for a target that no output can match: outputs become labels, or stay what they are."""
    labels = {label.strip() for label in example.labels}
    if "" in labels:
        raise UserError(f"A label of {where} is empty; leave it out of the task's labels.")
    if example.targets.strip() not in labels and judge(task, example, example.targets)[0] not in labels:
        raise UserError(f"The target of {where} is {example.targets!r}, which is none of the labels {sorted(labels)}.")
