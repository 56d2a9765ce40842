"""Collects the scores of single examples from an evaluation's outputs, as results hold them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from promot_jax.results import example_scores
from promot_jax.results.example_scores import ByEvaluation, ExampleScores
from promot_jax.results.scores import Icl, Output, Target

DECIMALS = 3  # of scores that are not 0 or 100


def of_target(target: Target, rows: Iterable[Output]) -> ByEvaluation:
    """The scores of the fine-tuned task, or of each task of a mixture."""
    metrics = {name: task.metric for name, task in target.tasks.items()}
    return {example_scores.TARGET: _by_draw(rows, metrics, target.metric).get(0, {})}


def of_icl(shots: int, icl: Icl, rows: Iterable[Output]) -> ByEvaluation:
    """The scores of an ICL evaluation, under a name for each draw of exemplars."""
    metrics = {name: task.metric for name, task in icl.tasks.items()}
    return {example_scores.icl(shots, draw): tasks for draw, tasks in _by_draw(rows, metrics).items()}


def _by_draw(
    rows: Iterable[Output], metrics: Mapping[str, str], metric: str = ""
) -> dict[int, dict[str, ExampleScores]]:
    """Scores by draw of exemplars and task, without tasks whose metric has none of single examples.

    `metrics` are the names of the tasks' metrics, `metric` that of all others.
    """
    by_task: dict[tuple[int, str], list[Output]] = {}
    for row in rows:
        by_task.setdefault((row.draw or 0, row.task), []).append(row)
    found: dict[int, dict[str, ExampleScores]] = {}
    for (draw, task), members in by_task.items():
        of_draw = found.setdefault(draw, {})
        numbers = [row.score for row in members if row.score is not None]
        statistics = [row.statistics for row in members if row.statistics]
        if len(members) in (len(numbers), len(statistics)):
            of_draw[task] = ExampleScores(
                metric=metrics.get(task, metric),
                examples=_digest(row.id for row in members),
                prompts=_digest(row.input for row in members),
                scores=_compact(numbers),
                statistics=[] if numbers else statistics,
            )
    return found


def _compact(scores: Sequence[float]) -> str | list[float]:
    if set(scores) <= {0.0, 100.0}:
        return "".join("1" if score else "0" for score in scores)
    return [round(score, DECIMALS) for score in scores]


def _digest(texts: Iterable[str]) -> str:
    """Twelve hexadecimal digits that differ where the texts or their order do."""
    whole = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        whole.update(b"%d:" % len(data) + data)
    return whole.hexdigest()[:12]
