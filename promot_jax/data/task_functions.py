"""Calls a task's own functions, post-processor and metrics; an error of theirs names the task and the example."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio

from promot_jax.data.examples import Example
from promot_jax.errors import UserError, users_code


class Judgement(NamedTuple):
    """An output as it is scored: by the first metric, where that has something of one example."""

    target: Any  # post-processed
    output: Any  # post-processed
    score: float | None  # on [0, 100]; None for a metric without scores of one example
    statistics: list[int | float]  # of a metric that is computed from their sums (BLEU), otherwise empty


def judge(task: seqio.Task, example: Example, output: str) -> Judgement:
    """Post-processes the target and an output of an example, without the space that joins them to the input; scores it.

    Raises:
        UserError: the post-processor or the metric raises.
    """
    features = {**example.features, **dataclasses.asdict(example)}
    metric = task.metric_fns[0] if task.metric_fns else None
    score, statistics = (getattr(metric, name, None) for name in ("per_example", "statistics"))
    with users_code(f"Judging the output {output[:80]!r} for example {example.id!r} of task {task.name!r}"):
        target = task.postprocess_fn(example.targets.removeprefix(" "), example=features, is_target=True)
        answer = task.postprocess_fn(output.removeprefix(" "), example=features, is_target=False)
        if score is not None:
            return Judgement(target, answer, score(target, answer), [])
        return Judgement(target, answer, None, [] if statistics is None else [*statistics(target, answer)])


def scores(task: seqio.Task, targets: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
    """Returns the numbers of all metrics of a task by name, its score first.

    Args:
        task: whose metrics are called.
        targets: post-processed, one per example.
        answers: post-processed outputs, one per example.

    Raises:
        UserError: there is no metric, one raises or returns no numbers, or the score is not in [0, 100].
    """
    found: dict[str, float] = {}
    for metric_fn in task.metric_fns:
        name = getattr(metric_fn, "name", getattr(metric_fn, "__name__", repr(metric_fn)))
        with users_code(f"Metric {name!r} of task {task.name!r}"):
            # SeqIO's own metrics wrap their numbers.
            values = {key: getattr(value, "value", value) for key, value in metric_fn(targets, answers).items()}
            found |= {str(key): float(value) for key, value in values.items()}
    if not found:
        raise UserError(f"Task {task.name!r} has no metric; register it with metric_fns.")
    metric, score = next(iter(found.items()))
    if not 0 <= score <= 100:
        raise UserError(f"Task {task.name!r} scores {metric} = {score}; its first metric must lie in [0, 100].")
    return found
