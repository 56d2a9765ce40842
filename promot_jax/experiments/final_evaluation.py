"""The final evaluation of a run, on the test split, and its `results.json`."""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from promot_jax import files, methods, trees
from promot_jax.checkpoints import stage_folder
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.evaluation import example_scores
from promot_jax.experiments.initial_params import prompts_of_tasks
from promot_jax.experiments.resume_guard import FINAL
from promot_jax.experiments.session import Session
from promot_jax.experiments.settings import Experiment
from promot_jax.methods.base import Stage
from promot_jax.params import lora
from promot_jax.results import records
from promot_jax.results.example_scores import ByEvaluation
from promot_jax.results.schema import Run, StageRecord
from promot_jax.results.scores import Icl, Output, StepEvaluation, Tested, first_of_each_task

Json = dict[str, Any]
Outputs = dict[str, list[Output]]  # by name of their file


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
    earlier = _tested(trained[last.name], finished.get(last.name)) if last and not last.per_task else None
    return evaluate(
        session,
        folder,
        method,
        whole,
        target_prompt=names,
        icl_prompt="",
        stages=finished,
        icl_params=plain,
        earlier=earlier,
    )


def _tested(folder: Path, stage: StageRecord | None) -> tuple[Tested, Path] | None:
    """The scores of a stage's best checkpoint on the test split, if its curve has them, and where its outputs lie."""
    if stage is None:
        return None
    tested = next((point.test for point in stage.curve if point.step == stage.best_step), None)
    outputs = outputs_of_test(folder, stage.best_step)
    there = hosts.decide(outputs.is_dir, "outputs of the test split")
    return (tested, outputs) if tested and there else None


def outputs_of_test(folder: Path, step: int) -> Path:
    """Where a stage's outputs on the test split lie, of one step (`Evaluation.curve_test`)."""
    return folder / "outputs" / f"test_{step:06d}"


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
    earlier: tuple[Tested, Path] | None = None,
) -> Run:
    """Scores the test split, writes `outputs/` and `results.json`, returns the run.

    Args:
        session: model and evaluator.
        folder: of the run.
        method: its name in the results.
        params: `{"model": ..., "prompt": {name: rows}}`.
        target_prompt: name of the prompt that is prepended on the fine-tuning task, or by task; "" for none.
        icl_prompt: of the ICL tasks.
        stages: the finished stages by name.
        icl_params: in the place of `params` for ICL.
        earlier: the scores of these parameters, and the folder of their outputs, where they were scored already.
    """
    started = time.monotonic()
    experiment = session.experiment
    settings = experiment.evaluation
    if earlier:
        tested, rows = earlier[0], _outputs_in(earlier[1], earlier[0])
    else:
        icl_params = params if icl_params is None else icl_params
        tested, rows = score_test(session, params, icl_params, target_prompt, icl_prompt)
    write_outputs(folder / "outputs", rows)
    samples = [sample for each in rows.values() for sample in first_of_each_task(each, settings.samples)]
    run = Run.of(
        method=method,
        seed=experiment.seed,
        steps={name: stage.steps for name, stage in stages.items()},
        seconds=sum(stage.seconds for stage in stages.values()) + time.monotonic() - started,
        target=tested.target,
        icl=tested.icl,
        example_scores=tested.example_scores,
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


def score_test(
    session: Session,
    params: trees.Tree,
    icl_params: trees.Tree,
    target_prompt: str | Mapping[str, str],
    icl_prompt: str = "",
) -> tuple[Tested, Outputs]:
    """Scores the split of the final evaluation.

    Args:
        session: model and evaluator.
        params: of the fine-tuning task.
        icl_params: of the ICL tasks.
        target_prompt: as in `evaluate`.
        icl_prompt: as in `evaluate`.

    Returns:
        The scores, and the outputs by name of their file: `target` and `icl_<shots>shot`.
    """
    experiment, evaluator, settings = session.experiment, session.evaluator, session.experiment.evaluation
    target = None
    icl: dict[str, Icl] = {}
    rows: Outputs = {}
    of_examples: ByEvaluation = {}
    if experiment.task:
        scored = evaluator.target(params, settings.split, settings.target_examples, target_prompt)
        target, rows["target"] = scored.entry, scored.rows
        of_examples |= example_scores.of_target(target, scored.rows)
    for shots in settings.shots if experiment.icl_mixture else ():
        entry, outputs = evaluator.icl(
            icl_params, shots, settings.split, settings.examples, icl_prompt, draws=settings.exemplar_draws
        )
        icl[str(shots)], rows[f"icl_{shots}shot"] = entry, outputs
        of_examples |= example_scores.of_icl(shots, entry, outputs)
    return Tested(target=target, icl=icl, example_scores=of_examples), rows


def write_outputs(folder: Path, rows: Outputs) -> None:
    """Writes outputs to `<name>.jsonl` in a folder."""
    for name, outputs in rows.items():
        files.write_rows(folder / f"{name}.jsonl", outputs)


def _outputs_in(folder: Path, tested: Tested) -> Outputs:
    """Reads what `write_outputs` wrote, the fine-tuning task first.

    Raises:
        UserError: a file is damaged, or not all outputs that `tested` is the score of are there.
    """
    counts = {"target": tested.target.n} if tested.target else {}
    for shots, icl in tested.icl.items():
        counts[f"icl_{shots}shot"] = sum(score.n for score in icl.tasks.values()) * max(1, len(icl.draws))
    outputs: Outputs = {}
    for name, count in counts.items():
        path = folder / f"{name}.jsonl"
        try:
            lines = path.read_text("utf-8").split("\n")
            outputs[name] = [msgspec.json.decode(line, type=Output) for line in filter(None, lines)]
            if len(outputs[name]) != count:
                raise ValueError(f"{len(outputs[name])} of {count} are there")
        except (OSError, ValueError, RecursionError) as error:  # `msgspec`'s and Unicode's are ValueErrors
            raise UserError(
                f"The outputs in {path} are damaged ({error}): delete {folder}, and they are made again."
            ) from error
    return outputs


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
