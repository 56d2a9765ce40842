"""What is there of a comparison: the state of its cells, the settings chosen of each method, and the results of all.

Everything is read from the cells' folders: `results.json` of those that are finished, `failed.json` of those that
cannot be.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.results import schema, spread
from promot_jax.results.comparison import comparison as join_runs
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.status import finished, state

Json = dict[str, Any]


def publish(grid: Grid, stale: float) -> None:
    """Writes the comparison of every task, of the cells that are finished so far, to its `results.json`.

    What shows a comparison while it runs (`promot_jax.report.markdown`) reads these files.
    """
    for found in latest(grid, stale) if hosts.is_writer() else ():
        for task, comparison in found.items():
            files.write(comparison, grid.report_folder(task) / "results.json")


def latest(grid: Grid, stale: float) -> Iterator[dict[str, Json]]:
    """Yields what is there to be written, and again while that is no more what was yielded last.

    So of several processes that write the same files, the one that writes last has seen all that was there then.
    """
    before: Json | None = None
    while (found := files.plain(collect(grid, stale))) != before:
        yield found
        before = found


def collect(grid: Grid, stale: float) -> dict[str, Json]:
    """Reads what is there: by task a comparison in the layout of `promot_jax.results.schema`.

    Of every method it holds the runs with the settings that are best on the validation split (`_best`). Further keys:
    `cells` (each with its state: finished, failed with a message, running in another process, or missing), `spread`
    (`analysis.spread`, of best and of matched checkpoints), and where settings are varied `selection`: by
    method all candidates and the chosen ones, `margin`, and `others`: the finished runs with settings that were not
    chosen, each with what is `varied`.
    """
    found: dict[str, Json] = {}
    for task in grid.tasks or [grid.experiment.task]:
        cells = [cell for cell in grid.cells() if cell.task == task]
        kept: list[Json] = []
        others: list[Json] = []
        selection: Json = {}
        for label in grid.methods:
            candidates: dict[tuple[tuple[str, float], ...], list[Cell]] = {}
            for cell in cells:
                if cell.label == label:
                    candidates.setdefault(cell.varied, []).append(cell)
            described = [_candidate(members) for members in candidates.values()]
            best = _best(described, grid.margin)
            for index, members in enumerate(candidates.values()):
                done = [cell for cell in members if finished(cell)]
                if index == best:
                    kept += map(_as_labelled, done)
                else:
                    others += [_as_labelled(cell) | {"varied": dict(cell.varied)} for cell in done]
            if described[best]["varied"]:
                selection[label] = {"chosen": described[best]["varied"], "candidates": described}
        comparison = join_runs(kept)
        comparison["cells"] = [state(grid, cell, stale) for cell in cells]
        comparison["spread"] = {
            "best": spread.of_comparison(comparison),
            "matched": spread.of_comparison(comparison, key="matched"),
        }
        if selection:
            comparison |= {"selection": selection, "margin": grid.margin, "others": others}
        found[task] = comparison
    return found


def validation_point(run: Json) -> Json:
    """The point of the curve, on the validation split, of the checkpoint that a run ends with; {} where none is."""
    last = next(reversed(run["steps"]), None)
    best = run["best_step"].get(last)
    return next((point for point in run["curve"] if (point["stage"], point["step"]) == (last, best)), {})


def _candidate(cells: Sequence[Cell]) -> Json:
    """Settings of a method with their validation scores: the target's of each seed, and the means, of ICL too."""
    points = {str(cell.seed): validation_point(schema.read(cell.folder)) for cell in cells if finished(cell)}
    means: dict[str, float | None] = {}
    for key in ("target", "icl"):
        known = [point[key] for point in points.values() if point.get(key) is not None]
        means[key] = statistics.fmean(known) if known else None
    scores = {seed: point.get("target") for seed, point in points.items()}
    return {"varied": dict(cells[0].varied), "validation": means["target"], "icl": means["icl"], "seeds": scores}


def _best(candidates: Sequence[Json], margin: float) -> int:
    """Which candidate is chosen, on the validation split.

    Settings that fail on a seed are behind those that do not. Of the others the one with the highest ICL counts, of
    those whose target score is at most `margin` points below the highest; of equals the smallest values.
    """
    whole = max(len(one["seeds"]) for one in candidates)
    left = [one for one in candidates if len(one["seeds"]) == whole]
    least = max(_known(one["validation"]) for one in left) - margin - 1e-9  # means may differ in their last digit

    def rank(one: Json) -> tuple[float, float, float]:
        return _known(one["icl"]), one["validation"] or 0.0, -sum(one["varied"].values())

    return candidates.index(max((one for one in left if _known(one["validation"]) >= least), key=rank))


def _known(score: float | None) -> float:
    """A score, below all others where there is none."""
    return -math.inf if score is None else score


def _as_labelled(cell: Cell) -> Json:
    """A finished run under the method that was asked for; a "+ 1-shot" run stands in its task's row."""
    run = schema.read(cell.folder) | {"method": cell.label}
    if cell.shots and run["target"]:
        run["target"] = run["target"] | {"task": cell.task, "shots": cell.shots}
    return run
