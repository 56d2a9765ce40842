"""The paper's tables as cells, from results. `promot_jax.report.markdown` renders them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from promot_jax.methods import REFERENCE, label
from promot_jax.results import bootstrap, matched_target, spread
from promot_jax.results.schema import Comparison, GradientAlignment, Matched, Run
from promot_jax.results.scores import Interval, Score, StepEvaluation

Checkpoint = Literal["best", "matched"]
ABSENT = "-"
AVERAGES = ("Norm. Avg.", "format share (%)")  # rows over all ICL tasks

READING = (
    "With a sign: difference to pretrained, paired by seed. In brackets: range over seeds where a cell averages "
    "several, otherwise the 95 % bootstrap interval over examples. Format share: ICL outputs that lie in the "
    "fine-tuned task's label set. Where examples were asked behind several draws of exemplars, scores are of the first."
)
MATCHED = (
    "The threshold is, seed by seed, the lowest of the methods' best target scores; each method is taken at its first "
    "checkpoint that reaches it, after at least one update of the model. Scores of the validation split, as in the "
    "curves."
)


@dataclass(frozen=True)
class Cell:
    """One score over seeds.

    Attributes:
        value: mean over the seeds that have it.
        low, high: range over seeds; for one seed its bootstrap interval, None where that is not known.
        change: difference to pretrained, None for pretrained itself or where pretrained has no such score.
        seeds: how many seeds the mean is over.
    """

    value: float
    low: float | None
    high: float | None
    change: float | None
    seeds: int

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


_Views = dict[str, dict[int, Run | Matched]]  # by method and seed
_Value = tuple[float, Interval | None]  # a number to be shown, with its bootstrap interval
_Get = Callable[[Run | Matched, str], _Value | None]  # of a run, at a number of shots


def scores(results: Comparison, checkpoint: Checkpoint = "best") -> Table:
    """The paper's main table: target score, each ICL task, normalised average, format share.

    Args:
        results: a comparison.
        checkpoint: of each run, the best one or that at matched target score; runs and methods without the latter are
            left out.

    Returns:
        A table with a cell for everything that at least one seed has.
    """
    views = _views(results, checkpoint)
    runs, shots, names = _runs_shots_tasks(views)
    table = Table(list(views), shots, [])
    targets = [run.target for run in runs if run.target]
    for task, metric in dict.fromkeys((target.task, target.metric) for target in targets):
        table.rows.append(_row(f"{task} ({_words(metric)}, target)", views, [None], partial(_of_target, task, metric)))
    parts = [part for target in targets for part in target.tasks.items()]
    for name, metric in dict.fromkeys((name, part.metric) for name, part in parts):
        table.rows.append(_row(f"{name} ({_words(metric)}, target)", views, [None], partial(_of_part, name, metric)))
    shown = {label(m): run.target.shots for m, members in views.items() for run in members.values() if run.target}
    if with_shots := ", ".join(f"{name} ({count}-shot)" for name, count in shown.items() if count):
        table.notes.append(f"Asked on the target as they were trained, behind exemplars: {with_shots}.")
    for name in names:
        entries = [icl.tasks[name] for run in runs for icl in run.icl.values() if name in icl.tasks]
        metrics = dict.fromkeys(_words(entry.metric) for entry in entries)
        table.rows.append(_row(f"{name} ({', '.join(metrics)})", views, shots, partial(_of_task, name)))
    if shots:
        complete = {count: {name for run in runs for name in _scored(run, count)} for count in shots}
        for index, title in enumerate(AVERAGES):
            table.rows.append(_row(title, views, shots, partial(_average, index, complete)))
        table.notes += _incomplete(views, complete)
    return table


def format_shares(results: Comparison) -> Table:
    """Format share of every ICL task, in percent; rows only for tasks that have one."""
    views = _views(results, "best")
    _, shots, names = _runs_shots_tasks(views)
    rows = [_row(name, views, shots, partial(_share_of_task, name)) for name in names]
    return Table(list(views), shots, [row for row in rows if row.cells])


def matched(results: Comparison) -> tuple[list[list[str]], list[str]]:
    """Compares methods at matched target score, from their curves (`matched_target.py`): validation scores.

    Returns:
        (rows, notes): rows of text, the header first; no rows when no run has a usable curve.
    """
    members = {method: {run.seed: run for run in runs} for method, runs in results.methods.items()}
    seeds = sorted({seed for runs in members.values() for seed in runs})
    curves = {name: [runs[seed].curve if seed in runs else [] for seed in seeds] for name, runs in members.items()}
    found = matched_target.matched(curves)
    used = [seed for index, seed in enumerate(seeds) if any(matches[index] for matches in found.values())]
    if not used:
        return [], []
    rows = [["method", "step of each seed", "target score", "ICL average", "change from step 0", "format share (%)"]]
    thresholds: dict[int, float] = {}
    for method, matches in found.items():
        kept = [(seed, match) for seed, match in zip(seeds, matches, strict=True) if match is not None]
        thresholds |= {seed: match.threshold for seed, match in kept}
        changes = [_change(members[method][seed].curve, match) for seed, match in kept]
        fields = [[getattr(match, name) for _, match in kept] for name in ("target", "icl")]
        steps = [place(match.step, match.alpha).removeprefix("step ") for _, match in kept]
        columns = [", ".join(steps), *(_over_seeds(values) for values in fields)]
        shares = _over_seeds([match.format_share for _, match in kept])
        rows.append([label(method), *columns, _over_seeds(changes, "+.1f"), shares])
    levels = ", ".join(f"{thresholds[seed]:.1f} (seed {seed})" for seed in used)
    notes = [f"Matched target score: {levels}."]
    if len(used) < len(seeds):
        left_out = ", ".join(str(seed) for seed in seeds if seed not in used)
        notes.append(f"Left out, as a method has no curve for it: seed {left_out}.")
    return rows, notes


def aligned_reading(alignments: Sequence[GradientAlignment]) -> str:
    """How gradient alignments (`analysis.gradient_alignment.along`) are read."""
    changed = ", ".join(f"{100 * one.changed:.0f} % ({one.stage} on {one.task}, seed {one.seed})" for one in alignments)
    return (
        "Cosine between the gradient on a batch and on the same batch with its targets shuffled among the rows. The "
        "band is the range over batches, of all parameters. Near 1 the step teaches what all targets share, their "
        f"format. Targets that changed: {changed}."
    )


SPREAD = "Seeds and exemplars"
SPREAD_READING = (
    "Mean over seeds of the means over exemplar draws: of best checkpoints on the test split, of those at matched "
    "target score on the validation split. Interval: Student's, of that mean over seeds (of one seed over draws). "
    "The standard deviations tell the two kinds of spread apart."
)


def varied(settings: Mapping[str, float]) -> str:
    """What a comparison varied of a run: `model 0.001, l2sp 0.1`."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


TRIED = "Settings tried"


def tried_reading(results: Comparison) -> str:
    """How a comparison chose between settings."""
    chosen = "The highest target score is chosen"
    if results.margin:
        chosen = f"Of those at most {results.margin:g} points below the highest target score, the highest ICL is chosen"
    return (
        f"Validation split, best checkpoint of each run, mean over seeds. {chosen}. A kind of stage goes by its "
        "learning rate."
    )


def tried_settings(results: Comparison) -> list[list[str]]:
    """All settings that a comparison tried, with their scores on the validation split; the header first.

    No rows where there was no choice.
    """
    rows = [["method", "setting", "target score", "ICL", "seeds", "chosen"]]
    for method, selection in results.selection.items():
        for tried in selection.candidates:
            chosen = "yes" if tried.varied == selection.chosen else ""
            shown = [number(tried.validation), number(tried.icl), str(len(tried.seeds)), chosen]
            rows.append([label(method), varied(tried.varied), *shown])
    return rows if len(rows) > 1 else []


def spreads(results: Comparison) -> list[list[str]]:
    """Target scores and ICL averages over seeds and exemplar draws (`results.spread`); the header first.

    Best checkpoints are of the test split, those at matched target score of the validation split. No rows where there
    is one seed and one draw of each method.
    """
    rows = [["method", "checkpoint", "score", "mean", "95 % interval", "sd seeds", "sd exemplars", "seeds x draws"]]
    several = False
    checkpoints: tuple[Checkpoint, ...] = ("best", "matched")
    for checkpoint in checkpoints:
        by_method = spread.of_comparison(results, checkpoint)
        for method, score, one in ((name, *item) for name in ordered(by_method) for item in by_method[name].items()):
            shown = "target" if score == "target" else f"Norm. Avg., {score}-shot"
            several |= one.seeds > 1 or one.draws > 1
            interval = ABSENT if one.ci95 is None else "[{:.1f}, {:.1f}]".format(*one.ci95)
            numbers = [number(one.mean), interval, number(one.sd_seeds), number(one.sd_draws)]
            rows.append([label(method), checkpoint, shown, *numbers, f"{one.seeds} x {one.draws}"])
    return rows if several else []


def unfinished(results: Comparison) -> list[str]:
    """A line for every cell of a comparison that is not finished."""
    cells = [cell for cell in results.cells if cell.state != "finished"]
    return [f"{cell.folder} is {cell.state}{f': {cell.message}' if cell.message else ''}" for cell in cells]


def number(value: float | None) -> str:
    """`55.0`, or "-" for none."""
    return ABSENT if value is None else f"{value:.1f}"


def _change(curve: Sequence[StepEvaluation], match: matched_target.Match) -> float | None:
    """ICL at the match less ICL before any update, which is the pretrained model's on the same examples."""
    start = next((point.icl for point in matched_target.model_tuning(curve) if point.step == 0), None)
    return None if start is None or match.icl is None else match.icl - start


def _over_seeds(values: Sequence[float | None], form: str = ".1f") -> str:
    """Mean, and the range where several seeds differ."""
    found = bootstrap.across_seeds(values)
    if found is None:
        return ABSENT
    mean, low, high = (format(round(value, 1) + 0.0, form) for value in found[:3])
    return mean if low == high else f"{mean} [{low}, {high}]"


def _views(results: Comparison, checkpoint: Checkpoint) -> _Views:
    """Scores to be shown of each run; "matched" leaves out runs and methods without such scores."""
    views: _Views = {}
    for method in ordered(results.methods):
        for run in results.methods[method]:
            scored = run if checkpoint == "best" else run.matched
            if scored:
                views.setdefault(method, {})[run.seed] = scored
        if checkpoint == "best":
            views.setdefault(method, {})
    return views


def _runs_shots_tasks(views: _Views) -> tuple[list[Run | Matched], list[str], list[str]]:
    """All runs, numbers of shots, ascending, and ICL tasks in order of appearance."""
    runs = [run for members in views.values() for run in members.values()]
    shots = sorted({shots for run in runs for shots in run.icl}, key=int)
    return runs, shots, list(dict.fromkeys(name for run in runs for icl in run.icl.values() for name in icl.tasks))


def _scored(run: Run | Matched, shots: str) -> dict[str, Score]:
    """The ICL tasks that have a score."""
    tasks = run.icl[shots].tasks if shots in run.icl else {}
    return {name: task for name, task in tasks.items() if task.score is not None}


def _row(title: str, views: _Views, columns: Sequence[str | None], get: _Get) -> Row:
    cells = {}
    for shots in columns:
        values = {
            method: {seed: value for seed, run in members.items() if (value := get(run, shots or "")) is not None}
            for method, members in views.items()
        }
        for method, by_seed in values.items():
            if by_seed:
                reference = None if method == REFERENCE else values.get(REFERENCE)
                cells[method, shots] = _cell(by_seed, reference)
    return Row(title, cells)


def _cell(by_seed: dict[int, _Value], reference: dict[int, _Value] | None) -> Cell:
    over = bootstrap.across_seeds(value for value, _ in by_seed.values())
    assert over is not None  # every value is a number
    low: float | None = over.low
    high: float | None = over.high
    if over.seeds == 1:
        low, high = next(iter(by_seed.values()))[1] or (None, None)
    change = None
    if reference:
        # Paired by seed where possible, since a seed shares its exemplars across methods.
        shared = [seed for seed in by_seed if seed in reference]
        ours = [by_seed[seed][0] for seed in shared or by_seed]
        theirs = [reference[seed][0] for seed in shared or reference]
        change = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return Cell(over.mean, low, high, change, over.seeds)


def _value(value: float | None, ci95: Interval | None = None) -> _Value | None:
    return None if value is None else (value, ci95)


def _of_target(task: str, metric: str, run: Run | Matched, _: str) -> _Value | None:
    target = run.target
    return _value(target.score, target.ci95) if target and (target.task, target.metric) == (task, metric) else None


def _of_part(name: str, metric: str, run: Run | Matched, _: str) -> _Value | None:
    """One task of a mixture that is the target."""
    part = run.target.tasks.get(name) if run.target else None
    return _value(part.score, part.ci95) if part and part.metric == metric else None


def _of_task(name: str, run: Run | Matched, shots: str) -> _Value | None:
    task = _scored(run, shots).get(name)
    return _value(task.score, task.ci95) if task else None


def _share_of_task(name: str, run: Run | Matched, shots: str) -> _Value | None:
    task = run.icl[shots].tasks.get(name) if shots in run.icl else None
    return _value(task.format_share) if task else None


def _average(index: int, complete: Mapping[str, set[str]], run: Run | Matched, shots: str) -> _Value | None:
    """One of `AVERAGES`, of a run with every task that any run has: averages over different tasks do not compare."""
    icl = run.icl.get(shots)
    if icl is None or _scored(run, shots).keys() != complete[shots]:
        return None
    return _value(icl.norm_avg, icl.ci95) if index == 0 else _value(icl.format_share)


def _incomplete(views: _Views, complete: Mapping[str, set[str]]) -> list[str]:
    partial = [
        f"{label(method)} (seed {seed}, {shots}-shot)"
        for method, members in views.items()
        for seed, run in members.items()
        for shots, names in complete.items()
        if shots in run.icl and _scored(run, shots).keys() != names
    ]
    return [f"Not in the averages, as tasks are missing: {', '.join(partial)}."] if partial else []


def _words(metric: str) -> str:
    return metric.replace("_", " ")
