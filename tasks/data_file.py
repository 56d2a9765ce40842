"""Registers a user's own data, a CSV file for instance, as a task: no Python is needed, `--gin.DATA=reviews.csv`.

From a module of tasks, for a mixture or a SeqIO cache: `data_file.register_data(DataFile("reviews.csv"))`.
"""

import collections
import statistics
from collections.abc import Callable, Mapping, Sequence

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio

from promot_jax.data import columns, examples, files
from promot_jax.data.chat import ChatTemplate
from promot_jax.data.columns import MESSAGES, Columns
from promot_jax.data.files import SPLITS, DataFile, DataSet
from promot_jax.data.rows import Row, RowsSource, hold_out
from promot_jax.errors import UserError, nearest

from . import metrics, postprocess
from .register import MetricFn, register
from .templates import Template

METRICS: Mapping[str, MetricFn] = {
    name: getattr(metrics, name) for name in ("accuracy", "exact_match", "trivia_match", "token_f1", "rouge2", "bleu")
}
# Targets that are this few, this frequent on average, and of this many words at most are labels.
MOST_LABELS, ROWS_PER_LABEL, LABEL_WORDS = 32, 4, 5
SHORT_ANSWER = 5  # words


def register_data(settings: DataFile, chat: Callable[[], ChatTemplate] | None = None) -> str:
    """Registers the task of a data set, `settings.task`, and prints what was chosen; once per process.

    Args:
        settings: where the data lie, templates and metric.
        chat: gives the chat template of the model, for data with a column `messages`.

    Returns:
        The task's name.

    Raises:
        UserError: the data cannot be read or used (`files.read`, `columns`), the metric is unknown, or a task of the
            name is registered already.
    """
    name = settings.task
    if _REGISTERED.get(name) == settings and name in seqio.TaskRegistry.names():
        return name
    examples.import_built_in()
    if name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
        raise UserError(f"A task called {name!r} is registered already: rename {settings.path}.")
    data = files.read(settings.path)
    how = columns.of(settings, data)
    rows = _rows(data, how, chat)
    splits = _with_all_splits(settings.path, rows)
    targets = [str(row["targets"]) for members in splits.values() for row in members]
    labels = labels_of(targets)
    metric = _metric(settings.metric, labels, targets)
    several_lines = not labels and any("\n" in target.strip() for target in targets)
    register(
        name,
        RowsSource(splits.__getitem__, SPLITS, name, marked=how.is_chat),
        Template("{inputs}", "{targets}", how.prefix),
        [METRICS[metric]],
        labels=labels,
        postprocess_fn=postprocess.whole if several_lines else None,
    )
    _REGISTERED[name] = settings
    print(_description(settings, data, how, splits, labels, metric), flush=True)
    return name


_REGISTERED: dict[str, DataFile] = {}


def labels_of(targets: Sequence[str]) -> tuple[str, ...]:
    """Returns the label set of a classification task, sorted, or () for targets that are no labels.

    Labels are few, frequent and short: see `MOST_LABELS`, `ROWS_PER_LABEL` on average, and `LABEL_WORDS`.
    """
    known = {target.strip() for target in targets}
    few = 2 <= len(known) <= min(MOST_LABELS, len(targets) // ROWS_PER_LABEL)
    return tuple(sorted(known)) if few and all(map(_is_short, known)) else ()


def _is_short(label: str) -> bool:
    return len(label.split()) <= LABEL_WORDS and "\n" not in label


def _metric(given: str, labels: Sequence[str], targets: Sequence[str]) -> str:
    """The name of the metric: as given, or accuracy for labels, exact match for short answers, ROUGE-2 otherwise."""
    if given:
        if given not in METRICS:
            raise UserError(f"METRIC is {given!r}, which is no metric{nearest(given, METRICS)}.")
        return given
    if labels:
        return "accuracy"
    return "exact_match" if statistics.median(len(target.split()) for target in targets) <= SHORT_ANSWER else "rouge2"


def _rows(data: DataSet, how: Columns, chat: Callable[[], ChatTemplate] | None) -> dict[str, list[Row]]:
    """Inputs and targets of all rows by split, with the ids of a column `id` where it has a different one in each."""
    ids = [columns.text_of(record.fields.get("id"), f"{record.where}, column 'id',") for record in data.records]
    has_ids = all(ids) and len(set(ids)) == len(ids)
    template = None
    if how.is_chat:
        if chat is None:
            raise UserError(f"{data.path} is a chat, for which a model's chat template is needed.")
        template = chat()
    rows: dict[str, list[Row]] = {}
    for split, records in data.splits.items():
        pairs = (
            columns.filled(records, how)
            if template is None
            else ((r, *template.split(r.fields.get(MESSAGES), r.where)) for r in records)
        )
        rows[split] = [
            {"inputs": inputs, "targets": targets} | ({"id": str(record.fields["id"])} if has_ids else {})
            for record, inputs, targets in pairs
        ]
    return rows


def _with_all_splits(path: str, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Takes a split that is missing out of `train`; raises UserError if a split is left without a row."""
    missing = [split for split in SPLITS if split not in rows]
    dealt = hold_out(rows["train"], missing, lambda row: str(row["inputs"]))
    for split, members in dealt.items():
        if not members:
            raise UserError(
                f"{path} has too few rows with different inputs ({len(rows['train'])} rows in all) to take a split "
                f"{split!r} from: give more, or a folder with files called train, validation and test."
            )
    return {split: (rows | dealt)[split] for split in SPLITS}


def _description(
    settings: DataFile,
    data: DataSet,
    how: Columns,
    splits: Mapping[str, Sequence[Row]],
    labels: Sequence[str],
    metric: str,
) -> str:
    """What was read, and what was chosen where nothing was set."""
    sizes = ", ".join(f"{split} {len(members):,}" for split, members in splits.items())
    dealt = [split for split in SPLITS if split not in data.splits]
    rows = sum(map(len, splits.values()))
    lines = [f"Task {settings.task!r} is {settings.path}: {rows:,} rows, columns {', '.join(data.columns)}."]
    if how.is_chat:
        lines.append(
            "  Input: the messages up to the last answer, in the model's chat template. Target: the last answer."
        )
    else:
        by = " (by the columns' names; INPUT_TEMPLATE and TARGET_TEMPLATE set it)" if how.chosen else ""
        lines.append(f"  Input: {how.inputs!r}. Target: {how.targets!r}{by}.")
    counts = collections.Counter(str(row["targets"]).strip() for members in splits.values() for row in members)
    if labels:
        lines.append(f"  Labels: {', '.join(f'{label!r} ({counts[label]:,} rows)' for label in labels)}.")
    else:
        lines.append(f"  Labels: none, there are {len(counts):,} different targets.")
    others = ", ".join(name for name in METRICS if name != metric)
    lines.append(f"  Metric: {metric}" + ("." if settings.metric else f" (METRIC sets another: {others})."))
    lines.append(f"  Splits: {sizes}" + (f"; {' and '.join(dealt)} by a hash of each row's input." if dealt else "."))
    return "\n".join(lines)
