"""Job `gradient_alignment`: gradients of a finished stage against those on shuffled targets (paper, figure 3)."""

import time
from collections.abc import Sequence
from pathlib import Path

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment
from promot_jax.results.provenance import commit, versions
from promot_jax.results.records import replace


def gradient_alignment(
    workdir: Path, experiment: Experiment, run: str, steps: Sequence[int] | int = (0,), batches: int = 8
) -> None:
    """Job: how far a stage's gradients depend on which input has which target (paper, figures 3 and 7).

    Args:
        workdir: gets `results.json` and `gradient_alignment.svg`. As `<comparison>/analyses/<name>` it becomes part of
            the comparison's report.
        experiment: modules of the tasks, and the mesh; model, task and seed are the run's own.
        run: folder of the stage, finished or running (`runs/demo/finetune/seed_0/finetune`).
        steps: those looked at, whose checkpoints were kept (`Training.keep_period`); 0 is before the first update.
        batches: of the run's own, from the first one on.

    Raises:
        UserError: not a stage's folder, a checkpoint that was not kept, or a workdir of other results.
    """
    from promot_jax.analysis import gradient_alignment as alignment
    from promot_jax.analysis.trained_stage import open_stage
    from promot_jax.report import figures
    from promot_jax.report.svg import document

    step_list = [steps] if isinstance(steps, int) else list(steps)
    if not step_list or min(step_list) < 0 or len(set(step_list)) < len(step_list) or batches < 1:
        raise UserError(f"Gradient alignment needs batches and steps, each step once, not {batches} at {step_list}.")
    if hosts.decide((workdir / "results.json").exists, "earlier results"):
        raise UserError(f"{workdir} holds results already; delete it, or give another --workdir.")
    started = time.monotonic()
    opened = open_stage(Path(run), experiment)
    found = replace(
        alignment.along(opened, step_list, batches),
        seconds=time.monotonic() - started,
        versions=versions(),
        commit=commit(),
    )
    files.write(found, workdir / "results.json")
    for chart in figures.gradient_alignment(found):
        files.write_text(workdir / f"{chart.name}.svg", document(chart))
