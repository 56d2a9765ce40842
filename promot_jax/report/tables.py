"""The paper's tables as cells, from results. `promot_jax.report.markdown` renders them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from promot_jax.methods import REFERENCE, label
from promot_jax.results import bootstrap, matched_target, spread

Json = dict[str, Any]
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


def scores(results: Json, *, key: str | None = None) -> Table:
    """The paper's main table: target score, each ICL task, normalised average, format share.

    Args:
        results: a comparison (`results.as_comparison`).
        key: None for the best checkpoint of each run; "matched" for the scores under that key of each run, runs and
            methods without it being left out.

    Returns:
        A table with a cell for everything that at least one seed has.
    """
    runs = {method: _views(results["methods"][method], key) for method in ordered(results["methods"])}
    runs = {method: members for method, members in runs.items() if members or key is None}
    everything = [run for members in runs.values() for run in members]
    shots = sorted({shots for run in everything for shots in run["icl"]}, key=int)
    names = list(dict.fromkeys(name for run in everything for entry in run["icl"].values() for name in entry["tasks"]))
    table = Table(list(runs), shots, [])
    targets = dict.fromkeys((run["target"]["task"], run["target"]["metric"]) for run in everything if run["target"])
    for task, metric in targets:
        table.rows.append(_row(f"{task} ({_words(metric)}, target)", runs, [None], _target_getter(task, metric)))
    parts = [item for run in everything if run["target"] for item in (run["target"].get("tasks") or {}).items()]
    for name, metric in dict.fromkeys((name, part["metric"]) for name, part in parts):
        table.rows.append(_row(f"{name} ({_words(metric)}, target)", runs, [None], _part_getter(name, metric)))
    behind = ((m, (run["target"] or {}).get("shots")) for m, members in runs.items() for run in members)
    if asked := {label(method): shots for method, shots in behind if shots}:
        told = ", ".join(f"{name} ({shots}-shot)" for name, shots in asked.items())
        table.notes.append(f"Asked on the target as they were trained, behind exemplars: {told}.")
    for name in names:
        entries = [entry["tasks"].get(name) for run in everything for entry in run["icl"].values()]
        metrics = list(dict.fromkeys(_words(entry["metric"]) for entry in entries if entry))
        table.rows.append(_row(f"{name} ({', '.join(metrics)})", runs, shots, _task_getter(name, "score")))
    if shots:
        complete = {count: {name for run in everything for name in _tasks(run, count)} for count in shots}
        for title, entry_key in zip(AVERAGES, ("norm_avg", "format_share"), strict=True):
            table.rows.append(_row(title, runs, shots, _average_getter(entry_key, complete)))
        table.notes += _incomplete(runs, complete)
    return table


def format_shares(results: Json) -> Table:
    """Format share of every ICL task, in percent; rows only for tasks that have one."""
    runs = {method: _views(results["methods"][method], None) for method in ordered(results["methods"])}
    everything = [run for members in runs.values() for run in members]
    shots = sorted({shots for run in everything for shots in run["icl"]}, key=int)
    names = dict.fromkeys(name for run in everything for entry in run["icl"].values() for name in entry["tasks"])
    rows = [_row(name, runs, shots, _task_getter(name, "format_share")) for name in names]
    return Table(list(runs), shots, [row for row in rows if row.cells])


def matched(results: Json) -> tuple[list[list[str]], list[str]]:
    """Compares methods at matched target score, from their curves (`tradeoff.matched`): validation scores.

    Returns:
        (rows, notes): rows of text, the header first; no rows when no run has a usable curve.
    """
    members = {method: {run["seed"]: run for run in runs} for method, runs in results["methods"].items()}
    seeds = sorted({seed for runs in members.values() for seed in runs})
    curves = {name: [runs[seed]["curve"] if seed in runs else [] for seed in seeds] for name, runs in members.items()}
    found = matched_target.matched(curves)
    used = [seed for index, seed in enumerate(seeds) if any(matches[index] for matches in found.values())]
    if not used:
        return [], []
    rows = [["method", "step of each seed", "target score", "ICL average", "change from step 0", "format share (%)"]]
    thresholds: dict[int, float] = {}
    for method, matches in found.items():
        kept = [(seed, match) for seed, match in zip(seeds, matches, strict=True) if match is not None]
        thresholds |= {seed: match.threshold for seed, match in kept}
        changes = [_change(members[method][seed]["curve"], match) for seed, match in kept]
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


def aligned_reading(found: Sequence[Json]) -> str:
    """How gradient alignments (`analysis.gradient_alignment.along`) are read."""
    changed = ", ".join(
        f"{100 * one['changed']:.0f} % ({one['stage']} on {one['task']}, seed {one['seed']})" for one in found
    )
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


def tried_reading(results: Json) -> str:
    """How a comparison chose between settings."""
    chosen = "The highest target score is chosen"
    if margin := results.get("margin"):
        chosen = f"Of those at most {margin:g} points below the highest target score, the highest ICL is chosen"
    return (
        f"Validation split, best checkpoint of each run, mean over seeds. {chosen}. A kind of stage goes by its "
        "learning rate."
    )


def tried_settings(results: Json) -> list[list[str]]:
    """All settings that a comparison tried, with their scores on the validation split; the header first.

    No rows where there was no choice.
    """
    rows = [["method", "setting", "target score", "ICL", "seeds", "chosen"]]
    for method, choice in results.get("selection", {}).items():
        for tried in choice["candidates"]:
            scores = [ABSENT if tried[key] is None else f"{tried[key]:.1f}" for key in ("validation", "icl")]
            chosen = "yes" if tried["varied"] == choice["chosen"] else ""
            rows.append([label(method), varied(tried["varied"]), *scores, str(len(tried["seeds"])), chosen])
    return rows if len(rows) > 1 else []


def spreads(results: Json) -> list[list[str]]:
    """Target scores and ICL averages over seeds and exemplar draws (`analysis.spread`); the header first.

    Best checkpoints are of the test split, those at matched target score of the validation split. No rows where there
    is one seed and one draw of each method.
    """
    rows = [["method", "checkpoint", "score", "mean", "95 % interval", "sd seeds", "sd exemplars", "seeds x draws"]]
    several = False
    for key, checkpoint in ((None, "best"), ("matched", "matched")):
        found = spread.of_comparison(results, key=key)
        for method, score, one in ((name, *item) for name in ordered(found) for item in found[name].items()):
            shown = "target" if score == "target" else f"Norm. Avg., {score}-shot"
            several |= one["seeds"] > 1 or one["draws"] > 1
            interval = ABSENT if one["ci95"] is None else "[{:.1f}, {:.1f}]".format(*one["ci95"])
            deviations = [ABSENT if one[key] is None else f"{one[key]:.1f}" for key in ("sd_seeds", "sd_draws")]
            counts = f"{one['seeds']} x {one['draws']}"
            rows.append([label(method), checkpoint, shown, f"{one['mean']:.1f}", interval, *deviations, counts])
    return rows if several else []


def unfinished(results: Json) -> list[str]:
    """A line for every cell of a comparison that is not finished."""
    lines = []
    for cell in results.get("cells", ()):
        if cell["state"] != "finished":
            message = f": {cell['message']}" if cell.get("message") else ""
            lines.append(f"{cell['folder']} is {cell['state']}{message}")
    return lines


def _change(curve: Sequence[Json], match: matched_target.Match) -> float | None:
    """ICL at the match less ICL before any update, which is the pretrained model's on the same examples."""
    start = next((point.get("icl") for point in matched_target.model_tuning(curve) if point["step"] == 0), None)
    return None if start is None or match.icl is None else match.icl - start


def _over_seeds(values: Sequence[float | None], form: str = ".1f") -> str:
    """Mean, and the range where several seeds differ."""
    found = bootstrap.across_seeds(values)
    if found is None:
        return ABSENT
    mean, low, high = (format(round(value, 1) + 0.0, form) for value in found[:3])
    return mean if low == high else f"{mean} [{low}, {high}]"


def _views(runs: Sequence[Json], key: str | None) -> list[Json]:
    """Runs with the scores to be shown under `target` and `icl`, never None."""
    if key is not None:
        runs = [{"seed": run["seed"], **run[key]} for run in runs if run.get(key)]
    return [{**run, "target": run.get("target"), "icl": run.get("icl") or {}} for run in runs]


def _tasks(run: Json, shots: str) -> Json:
    tasks: Json = run["icl"].get(shots, {}).get("tasks", {})
    return {name: task for name, task in tasks.items() if task.get("score") is not None}


def _row(
    title: str, runs: dict[str, list[Json]], columns: Sequence[str | None], get: Callable[..., Json | None]
) -> Row:
    cells = {}
    for shots in columns:
        found = {
            method: {run["seed"]: entry for run in members if (entry := get(run, shots)) is not None}
            for method, members in runs.items()
        }
        for method, by_seed in found.items():
            if by_seed:
                reference = None if method == REFERENCE else found.get(REFERENCE)
                cells[method, shots] = _cell(by_seed, reference)
    return Row(title, cells)


def _cell(by_seed: dict[int, Json], reference: dict[int, Json] | None) -> Cell:
    over = bootstrap.across_seeds(entry["score"] for entry in by_seed.values())
    assert over is not None  # getters only return entries with a score
    low: float | None = over.low
    high: float | None = over.high
    if over.seeds == 1:
        low, high = next(iter(by_seed.values())).get("ci95") or (None, None)
    change = None
    if reference:
        # Paired by seed where possible, since a seed shares its exemplars across methods.
        shared = [seed for seed in by_seed if seed in reference]
        ours = [by_seed[seed]["score"] for seed in shared or by_seed]
        theirs = [reference[seed]["score"] for seed in shared or reference]
        change = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return Cell(over.mean, low, high, change, over.seeds)


def _target_getter(task: str, metric: str) -> Callable[[Json, str | None], Json | None]:
    def get(run: Json, shots: str | None) -> Json | None:
        del shots
        target = run["target"]
        same = target and (target["task"], target["metric"]) == (task, metric) and target.get("score") is not None
        return target if same else None

    return get


def _part_getter(name: str, metric: str) -> Callable[[Json, str | None], Json | None]:
    """One task of a mixture that is the target."""

    def get(run: Json, shots: str | None) -> Json | None:
        del shots
        part = ((run["target"] or {}).get("tasks") or {}).get(name)
        return part if part and part["metric"] == metric and part.get("score") is not None else None

    return get


def _task_getter(name: str, key: str) -> Callable[[Json, str], Json | None]:
    def get(run: Json, shots: str) -> Json | None:
        task = run["icl"].get(shots, {}).get("tasks", {}).get(name)
        if not task or task.get(key) is None:
            return None
        return {"score": task[key], "ci95": task.get("ci95") if key == "score" else None}

    return get


def _average_getter(key: str, complete: dict[str, set[str]]) -> Callable[[Json, str], Json | None]:
    """Averages of runs that have every task that any run has: averages over different tasks do not compare."""

    def get(run: Json, shots: str) -> Json | None:
        entry = run["icl"].get(shots)
        if not entry or entry.get(key) is None or set(_tasks(run, shots)) != complete[shots]:
            return None
        return {"score": entry[key], "ci95": entry.get("ci95") if key == "norm_avg" else None}

    return get


def _incomplete(runs: dict[str, list[Json]], complete: dict[str, set[str]]) -> list[str]:
    partial = [
        f"{label(method)} (seed {run['seed']}, {shots}-shot)"
        for method, members in runs.items()
        for run in members
        for shots, names in complete.items()
        if shots in run["icl"] and set(_tasks(run, shots)) != names
    ]
    return [f"Not in the averages, as tasks are missing: {', '.join(partial)}."] if partial else []


def _words(metric: str) -> str:
    return metric.replace("_", " ")
