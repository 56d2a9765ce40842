"""Tables of text beside the scores: methods at matched target score, settings tried, spreads."""

from collections.abc import Sequence
from typing import NamedTuple

from promot_jax.methods import label
from promot_jax.report import checkpoints, frontier
from promot_jax.report.tables import ABSENT, number, ordered, place, signed, varied
from promot_jax.results import bootstrap, matched_target, paired, spread
from promot_jax.results.paired import Difference
from promot_jax.results.schema import Checkpoint, Comparison
from promot_jax.results.scores import StepEvaluation

MATCHED = (
    "It is, seed by seed, the lowest of the methods' best target scores. Each method is shown at its first checkpoint "
    "that reaches it, after at least one update of the model: none looks better for having learnt less of the target. "
    "Step 0 is before the first update of the model: there ICL is that of the pretrained model. All scores are of the "
    "validation split, as in the curves. In brackets: range over seeds."
)
SPREAD = (
    "Mean over seeds of the means over exemplar draws: of best checkpoints on the test split, of those at matched "
    "target score on the validation split unless it says otherwise. Interval: Student's, of that mean over seeds (of "
    "one seed over draws), within 0 to 100; two values are too few for one, two seeds have their range. The standard "
    "deviations tell the two kinds of spread apart."
)
PAIRED = (
    "Test split, best checkpoints: first method minus second, on the same examples with the same exemplars, mean over "
    "seeds and draws of exemplars. In brackets the 95 % interval of a paired bootstrap that draws seeds and examples; "
    "with one seed it draws examples only, and says nothing of other seeds. * The interval leaves out 0. Intervals are "
    "not corrected for the number of comparisons."
)

PAIRED_MATCHED = (
    "As above, on the test split too, but of each method its checkpoint at matched target score. That is chosen on the "
    "validation split (see below): on the test split target scores can differ."
)
CHECKPOINTS: dict[Checkpoint, str] = {"best": "best", "matched": "matched", "matched_test": "matched, test split"}


class Block(NamedTuple):
    """A table of text under a title, and how it is read; the header comes first."""

    title: str
    rows: list[list[str]]
    reading: str


def leading(results: Comparison) -> list[Block]:
    """What a comparison says first: paired differences, and the areas of the frontiers."""
    best = _paired("Paired differences", paired.differences(results), PAIRED)
    matched = _paired(
        "Paired differences at matched target score", paired.differences(results, "matched_test"), PAIRED_MATCHED
    )
    return _filled(best, matched, Block("Area of the frontier", *frontier.rows(results)))


def further(results: Comparison) -> list[Block]:
    """What it has besides its scores: matched target score, settings tried, spreads, differences of each task."""
    tasks = _paired_tasks(paired.differences(results))
    return _filled(matched(results), _tried(results), _spreads(results), tasks)


def wide(results: Comparison) -> list[Block]:
    """What is too wide for a terminal: every checkpoint, with a column for each ICL task."""
    return _filled(Block("Every checkpoint", *checkpoints.rows(results)))


def _filled(*blocks: Block) -> list[Block]:
    return [block for block in blocks if len(block.rows) > 1]


def _paired(title: str, differences: Sequence[Difference], reading: str) -> Block:
    """Paired differences in target score and ICL average: a row for each pair of methods."""
    kept = [one for one in differences if one.score in (paired.TARGET, paired.AVERAGE)]
    columns = dict.fromkeys(sorted(((one.score, one.shots) for one in kept), key=lambda key: int(key[1] or 0)))
    rows = [["difference", *(_with_shots(*key) for key in columns), "seeds", "examples"]]
    for (first, second), members in _by_pair(kept).items():
        cells = {(one.score, one.shots): one for one in members}
        seeds = max(one.seeds for one in members)
        sizes = {"target" if one.shots is None else "ICL": one.examples for one in members}
        shown = [_difference(cells.get(key)) for key in columns]
        counts = ["1: examples only" if seeds == 1 else str(seeds), ", ".join(f"{n} {of}" for of, n in sizes.items())]
        rows.append([f"{label(first)} - {label(second)}", *shown, *counts])
    return Block(title, rows, reading)


def _paired_tasks(differences: Sequence[Difference]) -> Block:
    """Paired differences of each ICL task: a row for each pair of methods and task."""
    kept = [one for one in differences if one.score not in (paired.TARGET, paired.AVERAGE)]
    shots = sorted({one.shots for one in kept if one.shots is not None}, key=int)
    rows = [["difference", "task", *(f"{count}-shot" for count in shots), "seeds"]]
    for (first, second), members in _by_pair(kept).items():
        for task in dict.fromkeys(one.score for one in members):
            cells = {one.shots: one for one in members if one.score == task}
            seeds = max(one.seeds for one in cells.values())
            shown = [_difference(cells.get(count)) for count in shots]
            rows.append([f"{label(first)} - {label(second)}", task, *shown, str(seeds)])
    return Block("Paired differences of each ICL task", rows, "Test split, as the paired differences of averages.")


def _by_pair(differences: Sequence[Difference]) -> dict[tuple[str, str], list[Difference]]:
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for one in differences:
        pairs.setdefault((one.first, one.second), []).append(one)
    return pairs


def _with_shots(score: str, shots: str | None) -> str:
    return score if shots is None else f"{score}, {shots}-shot"


def _difference(one: Difference | None) -> str:
    """`+3.1* [+1.0, +5.2]`, or "-" for none."""
    if one is None:
        return ABSENT
    low, high = map(signed, one.ci95)
    return f"{signed(one.mean)}{'*' if one.clear else ''} [{low}, {high}]"


def matched(results: Comparison) -> Block:
    """Compares methods at matched target score, from their curves (`matched_target.matched`): validation scores."""
    members = {method: {run.seed: run for run in runs} for method, runs in results.methods.items()}
    seeds = sorted({seed for runs in members.values() for seed in runs})
    curves = {name: [runs[seed].curve if seed in runs else [] for seed in seeds] for name, runs in members.items()}
    found = matched_target.matched(curves)
    used = [seed for index, seed in enumerate(seeds) if any(matches[index] for matches in found.values())]
    header = ["method", "step of each seed", "target score", "ICL average", "ICL, change from step 0"]
    rows = [[*header, "format share (%)"]]
    thresholds: dict[int, float] = {}
    for method, matches in found.items() if used else ():
        kept = [(seed, match) for seed, match in zip(seeds, matches, strict=True) if match is not None]
        thresholds |= {seed: match.threshold for seed, match in kept}
        changes = [_change(members[method][seed].curve, match) for seed, match in kept]
        steps = ", ".join(place(match.step, match.alpha).removeprefix("step ") for _, match in kept)
        target, icl, share = (
            _over_seeds([getattr(match, name) for _, match in kept]) for name in ("target", "icl", "format_share")
        )
        rows.append([label(method), steps, target, icl, _over_seeds(changes, "+.1f"), share])
    reading = [f"Matched target score: {', '.join(f'{thresholds[seed]:.1f} (seed {seed})' for seed in used)}."]
    if len(used) < len(seeds):
        left_out = ", ".join(str(seed) for seed in seeds if seed not in used)
        reading.append(f"Left out, as a method has no curve for it: seed {left_out}.")
    return Block("At matched target score", rows, " ".join([*reading, MATCHED]))


def _tried(results: Comparison) -> Block:
    """All settings that a comparison tried, with their scores on the validation split."""
    rows = [["method", "setting", "target score", "ICL", "seeds", "chosen"]]
    for method, selection in results.selection.items():
        for tried in selection.candidates:
            chosen = "yes" if tried.varied == selection.chosen else ""
            shown = [number(tried.validation), number(tried.icl), str(len(tried.seeds)), chosen]
            rows.append([label(method), varied(tried.varied), *shown])
    chosen = "The highest target score is chosen"
    if results.margin:
        chosen = f"Of those at most {results.margin:g} points below the highest target score, the highest ICL is chosen"
    reading = f"Validation split, best checkpoint of each run, mean over seeds. {chosen}. "
    return Block("Settings tried", rows, reading + "A kind of stage goes by its learning rate.")


def _spreads(results: Comparison) -> Block:
    """Target scores and ICL averages over seeds and exemplar draws (`results.spread`).

    No rows where there is one seed and one draw of each method.
    """
    rows = []
    several = False
    for checkpoint, called in CHECKPOINTS.items():
        by_method = spread.of_comparison(results, checkpoint)
        for method, score, one in ((name, *item) for name in ordered(by_method) for item in by_method[name].items()):
            shown = "target" if score == "target" else f"Norm. Avg., {score}-shot"
            several |= one.seeds > 1 or one.draws > 1
            interval = ABSENT if one.ci95 is None else "[{:.1f}, {:.1f}]".format(*one.ci95)
            if one.seeds == 2:
                interval = f"two seeds: {one.low:.1f} to {one.high:.1f}"
            numbers = [number(one.mean), interval, number(one.sd_seeds), number(one.sd_draws)]
            rows.append([label(method), called, shown, *numbers, f"{one.seeds} x {one.draws}"])
    header = ["method", "checkpoint", "score", "mean", "95 % interval", "sd seeds", "sd exemplars", "seeds x draws"]
    return Block("Seeds and exemplars", [header, *rows] if several else [], SPREAD)


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
