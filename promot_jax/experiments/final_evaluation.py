"""The final evaluation of a run, on the test split, and its `results.json`."""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax import files, methods, trees
from promot_jax.checkpoints import stage_folder
from promot_jax.distributed import hosts
from promot_jax.experiments.initial_params import prompts_of_tasks
from promot_jax.experiments.resume_guard import FINAL
from promot_jax.experiments.session import Session
from promot_jax.experiments.settings import Experiment
from promot_jax.methods.base import Stage
from promot_jax.params import lora
from promot_jax.results import records
from promot_jax.results.schema import Run, StageRecord
from promot_jax.results.scores import Sample, StepEvaluation, first_of_each_task

Json = dict[str, Any]


def close(
    session: Session, folder: Path, method: str, params: trees.Tree, trained: Mapping[str, Path], last: Stage | None
) -> Run:
    """Final evaluation of a method's run: each task with its soft prompt prepended, ICL on the stripped model.

    Args:
        session: model and evaluator.
        folder: of the run.
        method: its name (`methods.METHODS`).
        params: what its last stage left.
        trained: folder of each stage by name.
        last: the stage that made `params`, None for a method without stages.
    """
    finished: dict[str, StageRecord] = {}
    for name, path in trained.items():
        if stage := records.decide(partial(stage_folder.describe, path), StageRecord, f"the finished stage {name}"):
            finished[name] = stage
    whole = lora.merge(params, last.lora if last else None)
    plain = whole if last and last.keeps_lora else {"model": params["model"]}
    names = prompts_of_tasks(session.experiment, params.get("prompt")) if session.experiment.task else {}
    return evaluate(
        session, folder, method, whole, target_prompt=names, icl_prompt="", stages=finished, icl_params=plain
    )


def evaluate(
    session: Session,
    folder: Path,
    method: str,
    params: trees.Tree,
    *,
    target_prompt: str | Mapping[str, str],
    icl_prompt: str,
    stages: Mapping[str, StageRecord],
    icl_params: trees.Tree | None = None,
) -> Run:
    """Scores the test split, writes `outputs/` and `results.json`, returns the run.

    Args:
        session: model and evaluator.
        folder: of the run.
        method: its name in the results.
        params: `{"model": ..., "prompt": {name: rows}}`.
        target_prompt: name of the prompt that the fine-tuning task stands behind, or by task; "" for none.
        icl_prompt: of the ICL tasks.
        stages: the finished stages by name.
        icl_params: in the place of `params` for ICL.
    """
    started = time.monotonic()
    experiment, evaluator = session.experiment, session.evaluator
    settings = experiment.evaluation
    target = None
    samples: list[Sample] = []
    if experiment.task:
        scored = evaluator.target(params, settings.split, settings.target_examples, target_prompt)
        target = scored.entry
        files.write_rows(folder / "outputs" / "target.jsonl", scored.rows)
        samples += first_of_each_task(scored.rows, settings.samples)
    icl = {}
    asked = params if icl_params is None else icl_params
    for shots in settings.shots if experiment.icl_mixture else ():
        icl[str(shots)], rows = evaluator.icl(
            asked, shots, settings.split, settings.examples, icl_prompt, draws=settings.exemplar_draws
        )
        files.write_rows(folder / "outputs" / f"icl_{shots}shot.jsonl", rows)
        samples += first_of_each_task(rows, settings.samples)
    run = Run.of(
        method=method,
        seed=experiment.seed,
        steps={name: stage.steps for name, stage in stages.items()},
        seconds=sum(stage.seconds for stage in stages.values()) + time.monotonic() - started,
        target=target,
        icl=icl,
        curve=_curve(stages),
        model=experiment.checkpoint,
        base=session.base.base,
        best_step={name: stage.best_step for name, stage in stages.items()},
        leaves=session.base.leaves,
        samples=samples,
        settings=hosts.decide(lambda: _summary(folder, stages), "the summary of settings")
        | {"curve_shots": settings.curve_shots, "dtype": experiment.dtype, **settings_of(experiment)},
    )
    files.write(run, folder / "results.json")
    return run


def settings_of(experiment: Experiment) -> Json:
    """The settings of the final evaluation alone."""
    return {name: files.plain(getattr(experiment.evaluation, name)) for name in FINAL}


def _curve(described: Mapping[str, StageRecord]) -> list[StepEvaluation]:
    """The evaluations of all stages, as far as one line can hold them.

    Of several stages that tune the model only the last one's, which made the model that is evaluated; of stages that
    several tasks have each for itself none. Those stay in the stages' own `stage.json`.
    """
    curves = [stage.curve for stage in described.values()]
    names = [curve[0].stage if curve else "" for curve in curves]
    tuning = [index for index, name in enumerate(names) if name in methods.model_tuning()]
    kept = [i for i, name in enumerate(names) if (i in tuning[-1:] if i in tuning else names.count(name) == 1)]
    return [point for index in kept for point in curves[index]]


def _summary(folder: Path, described: Iterable[str]) -> Json:
    """The settings that each stage was started with, flat."""
    summary: Json = {}
    for name in described:
        nested = folder / name / "settings.json"
        path = nested if nested.is_file() else folder / "settings.json"
        training = trees.flatten(records.read(path, dict[str, Any]).get("training", {}))
        summary |= {f"{name}/{key}": value for key, value in training.items()}
    return summary
