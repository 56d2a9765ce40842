"""Packing: a step of fine-tuning with and without it, on tasks whose inputs are shorter than TASK_FEATURE_LENGTHS.

`batch` runs the same examples in fewer rows (`Training.pack_batch`), `rows` fills the rows with more examples
(`Training.pack`). The job itself runs; the time between its progress lines is measured, and divided by the examples of
an update. SmolLM2-135M, batches of 8 rows.
Time: 45 minutes on two cores; --quick --pairs 1: 5 minutes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, models
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import Column, Question, main

# Task, its module, and TASK_FEATURE_LENGTHS.
TASKS = {
    "movie_sentiment": ("promot_jax.tasks.demo", {"inputs": 48, "targets": 2}),
    "rte_like": ("benchmarks.tasks", {"inputs": 256, "targets": 2}),
    "qa_like": ("benchmarks.tasks", {"inputs": 256, "targets": 2}),
}
ROWS = 8


def cases(quick: bool) -> Sequence[Case]:
    """One per task."""
    return [_case(task, str(models.decoder(quick)), 2 if quick else 6) for task in TASKS]


def _case(task: str, folder: str, steps: int) -> Case:
    settings = {"folder": folder, "task": task, "steps": steps}
    plain = {"pack_batch": False}
    function = "benchmarks.packing:measure"
    sides = (
        Side("off", function, settings | {"training": plain}),
        Side("batch", function, settings | {"training": {"pack_batch": True}}),
        Side("rows", function, settings | {"training": plain | {"pack": True}}),
    )
    ratios = [Ratio(f"{side}_packing_speedup_{task}", "seconds_per_example", "off", side) for side in ("batch", "rows")]
    return Case(task, sides, tuple(ratios))


def measure(folder: str, task: str, steps: int, training: dict[str, Any]) -> dict[str, float]:
    """Median seconds of an update of the job, and per example."""
    module, lengths = TASKS[task]
    macros = {
        "INITIAL_CHECKPOINT_PATH": folder,
        "MIXTURE_OR_TASK_NAME": task,
        "MIXTURE_OR_TASK_MODULE": module,
        "TASK_FEATURE_LENGTHS": lengths,
        "BATCH_SIZE": ROWS,
        **{f"model/Training.{name}": value for name, value in training.items()},
    }
    seconds = commands.updates(models.training_command(**macros), "finetune", steps)
    count = _examples(folder, task) if training.get("pack") else ROWS
    return {"seconds": seconds, "examples": count, "seconds_per_example": seconds / count}


def _examples(folder: str, task: str) -> float:
    """Mean number of examples in an update of packed rows, of the first batches of the training stream."""
    import itertools

    from promot_jax.experiments.session import open_session
    from promot_jax.experiments.settings import Experiment
    from promot_jax.experiments.train_stream import train_batches

    module, lengths = TASKS[task]
    session = open_session(Experiment(str(Path(folder)), task, module, lengths, ""))
    _, stream = train_batches(session, None, batch_size=ROWS, layout=session.base.model.layout, pack=True)
    batches = list(itertools.islice(stream, 20))
    return sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches) / len(batches)


QUESTION = Question(
    "packing",
    cases,
    {
        "seconds": Column("seconds per update"),
        "examples": Column("examples per update"),
        "seconds_per_example": Column("seconds per example"),
    },
)

if __name__ == "__main__":
    main(QUESTION)
