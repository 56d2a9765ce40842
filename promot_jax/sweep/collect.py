"""What is there of a comparison: the state of its cells, the settings chosen of each method, and the results of all.

Everything is read from the cells' folders: `results.json` of those that are finished, `failed.json` of those that
cannot be.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import get_args

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.results import schema, spread
from promot_jax.results.comparison import comparison as join_runs
from promot_jax.results.records import replace
from promot_jax.results.schema import Candidate, Checkpoint, Comparison, Run, Selection
from promot_jax.results.scores import StepEvaluation
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.status import finished, state


def publish(grid: Grid, stale: float) -> None:
    """Writes the comparison of every task, of the cells that are finished so far, to its `results.json`.

    What shows a comparison while it runs (`promot_jax.report.markdown`) reads these files.
    """
    for by_task in latest(grid, stale) if hosts.is_writer() else ():
        for task, comparison in by_task.items():
            files.write(comparison, grid.report_folder(task) / "results.json")


def latest(grid: Grid, stale: float) -> Iterator[dict[str, Comparison]]:
    """Yields what is there to be written, and again while that is no more what was yielded last.

    So of several processes that write the same files, the one that writes last has seen all that was there then.
    """
    before: dict[str, Comparison] | None = None
    while (by_task := collect(grid, stale)) != before:
        yield by_task
        before = by_task


def collect(grid: Grid, stale: float) -> dict[str, Comparison]:
    """Reads what is there: a comparison by task.

    Of every method it holds the runs with the settings that are best on the validation split (`_best`); the others are
    in `others` where settings are varied.
    """
    comparisons: dict[str, Comparison] = {}
    for task in grid.tasks or [grid.experiment.task]:
        cells = [cell for cell in grid.cells() if cell.task == task]
        kept: list[Run] = []
        others: list[Run] = []
        selection: dict[str, Selection] = {}
        for label in grid.methods:
            by_settings: dict[tuple[tuple[str, float], ...], list[Cell]] = {}
            for cell in (cell for cell in cells if cell.label == label):
                by_settings.setdefault(cell.varied, []).append(cell)
            candidates = [_candidate(members) for members in by_settings.values()]
            best = _best(candidates, grid.margin)
            for index, members in enumerate(by_settings.values()):
                done = [cell for cell in members if finished(cell)]
                if index == best:
                    kept += map(_as_labelled, done)
                else:
                    others += [replace(_as_labelled(cell), varied=dict(cell.varied)) for cell in done]
            if candidates[best].varied and candidates[best].validation is not None:
                selection[label] = Selection(chosen=candidates[best].varied, candidates=candidates)
        joined = join_runs(kept)
        comparisons[task] = replace(
            joined,
            cells=[state(grid, cell, stale) for cell in cells],
            spread={checkpoint: spread.of_comparison(joined, checkpoint) for checkpoint in get_args(Checkpoint)},
            selection=selection,
            margin=grid.margin,
            others=others,
        )
    return comparisons


def validation_point(run: Run) -> StepEvaluation | None:
    """The evaluation, on the validation split, of the checkpoint that a run ends with; None where there is none."""
    last = next(reversed(run.steps), "")
    best = run.best_step.get(last)
    return next((point for point in run.curve if (point.stage, point.step) == (last, best)), None)


def _candidate(cells: Sequence[Cell]) -> Candidate:
    """Settings of a method with their validation scores: the target's of each seed, and the means, of ICL too."""
    points = {str(cell.seed): validation_point(schema.read_run(cell.folder)) for cell in cells if finished(cell)}
    return Candidate(
        varied=dict(cells[0].varied),
        validation=_mean([point.target for point in points.values() if point]),
        icl=_mean([point.icl for point in points.values() if point]),
        seeds={seed: point.target if point else None for seed, point in points.items()},
    )


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known else None


def _best(candidates: Sequence[Candidate], margin: float) -> int:
    """Which candidate is chosen, on the validation split.

    Settings that fail on a seed come after those that do not. Of the others the one with the highest ICL counts, of
    those whose target score is at most `margin` points below the highest; of equals the smallest values.
    """
    whole = max(len(candidate.seeds) for candidate in candidates)
    left = [candidate for candidate in candidates if len(candidate.seeds) == whole]
    least = max(_known(candidate.validation) for candidate in left) - margin - 1e-9  # means differ in their last digit

    def rank(candidate: Candidate) -> tuple[float, float, float]:
        return _known(candidate.icl), candidate.validation or 0.0, -sum(candidate.varied.values())

    return candidates.index(max((one for one in left if _known(one.validation) >= least), key=rank))


def _known(score: float | None) -> float:
    """A score, below all others where there is none."""
    return -math.inf if score is None else score


def _as_labelled(cell: Cell) -> Run:
    """A finished run under the method that was asked for; a "+ 1-shot" run stands in its task's row."""
    run = schema.read_run(cell.folder)
    target = run.target
    if cell.shots and target:
        target = replace(target, task=cell.task, shots=cell.shots)
    return replace(run, method=cell.label, target=target)
