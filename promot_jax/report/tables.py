"""The paper's tables as cells, from results. `promot_jax.report.markdown` renders them."""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from promot_jax.methods import REFERENCE, label
from promot_jax.results.schema import Checkpoint, Comparison, GradientAlignment, Scored
from promot_jax.results.scores import Interval, Score

ABSENT = "-"
AVERAGES = ("Norm. Avg.", "format share (%)")  # rows over all ICL tasks

# What the words and signs of the tables mean.
TERMS = {
    "Target": "the task that the model was fine-tuned on. Target score: the score on it, with the method's soft prompt "
    "prepended where it has one.",
    "ICL": "in-context learning: tasks that the model was not fine-tuned on, evaluated with exemplars in the input "
    "(4-shot: four of them) and without a soft prompt.",
    "Norm. Avg.": "mean of the ICL tasks' scores, each on 0 to 100, all tasks weighing the same.",
    "Format share": "percentage of ICL outputs that are one of the target's labels. More than pretrained: the model "
    "answers other tasks as if they were the target. ICL tasks that have such a label themselves have none.",
    "n": "number of examples.",
    "With a sign": "difference to pretrained, paired by seed.",
    "In brackets": "range over seeds where a cell averages several, otherwise the 95 % bootstrap interval over "
    "examples. Of several draws of exemplars, scores are of the first.",
}
LIKELIHOOD = (
    "acc: accuracy of the label with the greatest log-likelihood; acc norm: of the greatest one per character, as in "
    "lm-eval."
)


@dataclass(frozen=True)
class Cell:
    """One score over seeds."""

    value: float  # mean over the seeds that have it
    low: float | None  # range over seeds; for one seed its bootstrap interval, None where that is not known
    high: float | None
    change: float | None  # difference to pretrained, None for pretrained itself or where pretrained has no such score
    seeds: int  # how many the mean is over
    clear: bool = field(default=False, compare=False)  # whether its interval and pretrained's are known and disjoint

    def main(self) -> str:
        """`55.0 (+3.1)`."""
        return f"{self.value:.1f}" if self.change is None else f"{self.value:.1f} ({signed(self.change)})"

    def interval(self) -> str:
        """`[48.2, 61.0]`, or nothing."""
        return "" if self.low is None or self.high is None else f"[{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Row:
    """One line of a table; cells by (method, shots), or (method, None) for a score that has no shots."""

    label: str
    cells: dict[tuple[str, str | None], Cell]

    @property
    def summary(self) -> bool:
        """Whether it is the target's or an average, which stand out."""
        return self.label in AVERAGES or self.label.endswith("target)")

    @property
    def less_is_better(self) -> bool:
        """Whether a fall of the score is an improvement."""
        return self.label == AVERAGES[1]


@dataclass
class Table:
    """Rows of scores under methods x shots, and remarks that belong under the table."""

    methods: list[str]
    shots: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def columns(self, methods: Sequence[str]) -> list[tuple[str, str | None]]:
        """(method, shots) of each column, for some of the methods; shots is None where there is no ICL at all."""
        counts: list[str | None] = [*self.shots] or [None]
        return [(method, shots) for method in methods for shots in counts]

    def parts(self, row: Row, column: tuple[str, str | None]) -> tuple[str, str]:
        """(score with change, interval) as text; a score without shots stands in the first column of its method."""
        method, shots = column
        first = not self.shots or shots == self.shots[0]
        cell = row.cells.get(column) or (row.cells.get((method, None)) if first else None)
        if cell is None:
            return ABSENT if first or not any(key[1] is None for key in row.cells) else "", ""
        return cell.main(), cell.interval()


def signed(value: float) -> str:
    """`+3.1`, `-0.4`; never `-0.0`."""
    return f"{round(value, 1) + 0.0:+.1f}"


def place(step: int, alpha: float | None = None) -> str:
    """Where on its curve a point lies: `step 60`; of a model between two (WiSE-FT) `alpha 0.30`."""
    return f"step {step}" if alpha is None else f"alpha {alpha:.2f}"


def ordered(methods: Iterable[str]) -> list[str]:
    """Pretrained first, the others as they come."""
    return sorted(methods, key=lambda method: method != REFERENCE)


_Views = dict[str, dict[int, Scored]]  # by method and seed
_Value = tuple[float, Interval | None]  # a number to be shown, with its bootstrap interval
_Values = dict[tuple[int, str], dict[str | None, _Value | None]]  # of a run, by (kind of row, name) and shots
_TARGET, _PART, _ICL, _AVERAGE, _LIKELIHOOD = range(5)  # kinds of rows, in order


def scores(results: Comparison, checkpoint: Checkpoint = "best") -> Table:
    """The paper's main table: target score, each ICL task, normalised average, format share.

    `checkpoint` is, of each run, the best one or that at matched target score, with its scores of the validation or of
    the test split; runs and methods without the latter are left out.
    """
    views = _views(results, checkpoint)
    runs, shots = _runs_and_shots(views)
    # An average counts of runs with every task that any run has: averages over different tasks do not compare.
    complete = {count: {name for run in runs for name in _scored(run, count)} for count in shots}
    metrics: dict[str, dict[str, None]] = {}
    for name, task in (item for run in runs for icl in run.icl.values() for item in icl.tasks.items()):
        metrics.setdefault(name, {})[_words(task.metric)] = None
    rows = _rows(views, lambda run: _values(run, complete))
    table = Table(list(views), shots, [])
    for (kind, name), cells in sorted(rows.items(), key=lambda item: item[0][0]):
        table.rows.append(Row(f"{name} ({', '.join(metrics[name])})" if kind == _ICL else name, cells))
    shown = {label(m): run.target.shots for m, members in views.items() for run in members.values() if run.target}
    if with_shots := ", ".join(f"{name} ({count}-shot)" for name, count in shown.items() if count):
        table.notes.append(f"Evaluated on the target with exemplars in the input, as trained: {with_shots}.")
    if any(kind == _LIKELIHOOD for kind, _ in rows):
        table.notes.append(LIKELIHOOD)
    partial = [
        f"{label(method)} (seed {seed}, {count}-shot)"
        for method, members in views.items()
        for seed, run in members.items()
        for count, names in complete.items()
        if count in run.icl and _scored(run, count) != names
    ]
    if partial:
        table.notes.append(f"Not in the averages, as tasks are missing: {', '.join(partial)}.")
    table.notes += _sharing_labels(runs)
    return table


def at_matched_score(results: Comparison) -> dict[str, Table]:
    """`scores` of the checkpoints at matched target score, by split; only splits that some run has."""
    checkpoints: dict[str, Checkpoint] = {"validation split": "matched", "test split": "matched_test"}
    found = {split: scores(results, checkpoint) for split, checkpoint in checkpoints.items()}
    return {split: table for split, table in found.items() if table.rows}


def format_shares(results: Comparison) -> Table:
    """Format share of every ICL task, in percent; rows only for tasks that have one."""
    views = _views(results, "best")

    def values(run: Scored) -> _Values:
        found: _Values = {}
        for shots, icl in run.icl.items():
            for name, task in icl.tasks.items():
                found.setdefault((_ICL, name), {})[shots] = _value(task.format_share)
        return found

    rows = [Row(name, cells) for (_, name), cells in _rows(views, values).items() if cells]
    runs, shots = _runs_and_shots(views)
    return Table(list(views), shots, rows, _sharing_labels(runs))


def _sharing_labels(runs: Sequence[Scored]) -> list[str]:
    """A note that names the ICL tasks without a format share, where others of the same evaluation have one."""
    names: dict[str, None] = {}
    for icl in (icl for run in runs for icl in run.icl.values()):
        if any(task.format_share is not None for task in icl.tasks.values()):
            names |= dict.fromkeys(name for name, task in icl.tasks.items() if task.n and task.format_share is None)
    return [f"No format share, as a label of theirs is one of the target's: {', '.join(names)}."] if names else []


def facts(comparisons: Sequence[Comparison], folder: Path | None = None) -> dict[str, list[str]]:
    """What was run, by name: the different values, "-" for none.

    With the `folder` that a report is written into and the day.
    """
    runs = [run for comparison in comparisons for run in comparison.runs]
    commits = [(run.commit or "").partition("-") for run in runs]
    values: dict[str, list[Any]] = {
        "Model": [run.model for run in runs],
        "Target (fine-tuned on)": [run.target.task for run in runs if run.target],
        "Methods": [label(method) for comparison in comparisons for method in comparison.methods],
        "Seeds": sorted({run.seed for run in runs}),
        "Steps": [f"{stage} {steps}" for run in runs for stage, steps in run.steps.items()],
        "Learning rates": [
            f"{name.partition('/')[0]} {value:g}" if "/" in name else f"{value:g}"
            for run in runs
            for name, value in run.settings.items()
            if name.endswith("learning_rate") and "prompt_optimizer" not in name and isinstance(value, float)
        ],
        "Commit": [digits[:12] + dash + rest for digits, dash, rest in commits],
        "Versions": [f"{name} {version}" for run in runs for name, version in run.versions.items() if version],
    }
    known = {name: dict.fromkeys(str(value) for value in of if value not in (None, "")) for name, of in values.items()}
    written = {"Folder": [str(folder)], "Date": [f"{datetime.date.today():%Y-%m-%d}"]} if folder else {}
    return {name: [*of] or [ABSENT] for name, of in known.items()} | written


def aligned_reading(alignments: Sequence[GradientAlignment]) -> str:
    """How gradient alignments (`analysis.gradient_alignment.along`) are read."""
    changed = ", ".join(f"{100 * one.changed:.0f} % ({one.stage} on {one.task}, seed {one.seed})" for one in alignments)
    return (
        "Cosine between the gradient on a batch and on the same batch with its targets shuffled among the rows. The "
        "band is the range over batches, of all parameters. Near 1 the step teaches what all targets share, their "
        f"format. Targets that changed: {changed}."
    )


def varied(settings: Mapping[str, float]) -> str:
    """What a comparison varied of a run: `learning_rate 0.001, l2sp_weight 0.1`."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def unfinished(results: Comparison) -> list[str]:
    """A line for every cell of a comparison that is not finished."""
    cells = [cell for cell in results.cells if cell.state != "finished"]
    return [f"{cell.folder} is {cell.state}{f': {cell.message}' if cell.message else ''}" for cell in cells]


def number(value: float | None) -> str:
    """`55.0`, or "-" for none."""
    return ABSENT if value is None else f"{value:.1f}"


def _views(results: Comparison, checkpoint: Checkpoint) -> _Views:
    """Scores to be shown of each run; those at matched target score leave out runs and methods without such scores."""
    views: _Views = {}
    for method in ordered(results.methods):
        for run in results.methods[method]:
            if scored := run.at(checkpoint):
                views.setdefault(method, {})[run.seed] = scored
        if checkpoint == "best":
            views.setdefault(method, {})
    return views


def _runs_and_shots(views: _Views) -> tuple[list[Scored], list[str]]:
    runs = [run for members in views.values() for run in members.values()]
    return runs, sorted({shots for run in runs for shots in run.icl}, key=int)


def _scored(run: Scored, shots: str) -> set[str]:
    """The ICL tasks that have a score."""
    tasks = run.icl[shots].tasks if shots in run.icl else {}
    return {name for name, task in tasks.items() if task.score is not None}


def _values(run: Scored, complete: Mapping[str, set[str]]) -> _Values:
    """All scores of a run; averages only where it has every task of `complete`, by shots."""
    found: _Values = {}
    if target := run.target:
        titled = {(_TARGET, target.task): target} | {(_PART, name): part for name, part in target.tasks.items()}
        for (kind, name), one in titled.items():
            found[kind, f"{name} ({_words(one.metric)}, target)"] = {None: _value(one.score, one.ci95)}
            found |= {(_LIKELIHOOD, row): {None: _value(acc)} for row, acc in _accuracies(f"{name}, target", one)}
    for shots, icl in run.icl.items():
        for name, task in icl.tasks.items():
            found.setdefault((_ICL, name), {})[shots] = _value(task.score, task.ci95)
            for row, acc in _accuracies(name, task):
                found.setdefault((_LIKELIHOOD, row), {})[shots] = _value(acc)
        whole = _scored(run, shots) == complete[shots]
        averages = (_value(icl.norm_avg, icl.ci95), _value(icl.format_share))
        for title, value in zip(AVERAGES, averages, strict=True):
            found.setdefault((_AVERAGE, title), {})[shots] = value if whole else None
    return found


def _accuracies(name: str, scored: Score) -> list[tuple[str, float]]:
    """Accuracies of a task by the likelihood of its labels, with their rows' labels; nothing where there are none."""
    values = ((f"{name} (acc)", scored.acc), (f"{name} (acc norm)", scored.acc_norm))
    return [(row, value) for row, value in values if value is not None]


def _rows(
    views: _Views, values: Callable[[Scored], _Values]
) -> dict[tuple[int, str], dict[tuple[str, str | None], Cell]]:
    """The cells of each row, whose values come from every run; pretrained first, shots ascending."""
    by_row: dict[tuple[int, str], dict[str | None, dict[str, dict[int, _Value]]]] = {}
    for method, members in views.items():
        for seed, run in members.items():
            for key, by_shots in values(run).items():
                row = by_row.setdefault(key, {})
                for shots, value in by_shots.items():
                    if value is not None:
                        row.setdefault(shots, {}).setdefault(method, {})[seed] = value
    return {
        key: {
            (method, shots): _cell(by_seed, None if method == REFERENCE else by_method.get(REFERENCE))
            for shots, by_method in sorted(row.items(), key=lambda item: int(item[0] or 0))
            for method, by_seed in by_method.items()
        }
        for key, row in by_row.items()
    }


def _cell(by_seed: Mapping[int, _Value], reference: Mapping[int, _Value] | None) -> Cell:
    value, low, high = _interval(by_seed)
    change, clear = None, False
    if reference:
        _, from_low, from_high = _interval(reference)
        if low is not None and high is not None and from_low is not None and from_high is not None:
            clear = low > from_high or high < from_low
        # Paired by seed where possible, since a seed shares its exemplars across methods.
        shared = by_seed.keys() & reference.keys()
        ours, theirs = (mean(of[seed][0] for seed in shared or of) for of in (by_seed, reference))
        change = ours - theirs
    return Cell(value, low, high, change, len(by_seed), clear)


def _interval(by_seed: Mapping[int, _Value]) -> tuple[float, float | None, float | None]:
    """Mean over seeds, and their range; the bootstrap interval of a single one."""
    values = [value for value, _ in by_seed.values()]
    low, high = next(iter(by_seed.values()))[1] or (None, None) if len(values) == 1 else (min(values), max(values))
    return mean(values), low, high


def _value(value: float | None, ci95: Interval | None = None) -> _Value | None:
    return None if value is None else (value, ci95)


def _words(metric: str) -> str:
    return metric.replace("_", " ")
