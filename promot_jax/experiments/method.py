"""One method of one run: its stages, each from the best checkpoint of the one before, then the final evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.checkpoints.orbax import Saved
from promot_jax.checkpoints.stage_folder import STAGE_FILE, describe
from promot_jax.errors import UserError
from promot_jax.experiments.final_evaluation import close
from promot_jax.experiments.initial_params import fresh_prompt, start, task_prompts
from promot_jax.experiments.resume_guard import keep_settings, shared_settings
from promot_jax.experiments.session import Session, check_method, narrowed
from promot_jax.experiments.stage import check_prompt, recorded, run_stage
from promot_jax.methods.base import Stage
from promot_jax.results import records, schema
from promot_jax.results.schema import Run
from promot_jax.trackers.run import TrackedRun, tracked
from promot_jax.training.settings import Training, Tuning


def run_method(session: Session, folder: Path, method: str, tuning: Tuning) -> Run:
    """Runs the stages of a method, each from the best checkpoint of the one before, strips the prompt and evaluates.

    Returns the run as `results.json` holds it; a finished run in the folder as it is.

    Raises:
        UserError: a setting that the method needs is missing, or it needs a mixture and has none.
    """
    chosen = tuning.method(method)
    plan = chosen.stages
    check_method(session.experiment, chosen, tuning)
    tuned = {stage.name: recorded(stage, tuning.of(stage)) for stage in plan}
    settings = {"method": method, "tuning": tuned, **shared_settings(session.experiment)}
    done = records.decide(lambda: _finished_run(folder, settings), Run, "a finished run")
    if done:
        print(f"[{method}] is finished in {folder}.", flush=True)
        return done
    if plan:
        session.evaluator.check_queries()
    params = start(session, [] if any(stage.per_task for stage in plan) else plan)
    folders: dict[str, Path] = {}
    with tracked(session.experiment.tracker, folder, files.plain(settings)) as run:
        for stage in plan:
            where, training = folder / stage.name, tuning.of(stage)
            if stage.per_task:
                params["prompt"], found = _prompt_per_task(session, where, stage, training, params, run)
                folders |= {f"{stage.name}/{task}": path for task, path in found.items()}
                continue
            folders[stage.name] = where
            params = run_stage(session, where, stage, training, params, run)
        results = close(session, folder, method, params, folders, plan[-1] if plan else None)
        run.final(results)
    return results


def check_kept(folder: Path, stages: Sequence[Stage]) -> None:
    """Raises UserError where a finished run has lost a soft prompt, or the checkpoint that its last stage left.

    A stage whose folder was deleted as a whole is not missed: the run's results are there.
    """
    for stage in stages:
        if not stage.leaves_prompt:
            continue
        pattern = f"{stage.name}/*/{STAGE_FILE}" if stage.per_task else f"{stage.name}/{STAGE_FILE}"
        for record in sorted(folder.glob(pattern)):
            check_prompt(record.parent, again=folder)
    last = folder / stages[-1].name if stages else folder
    if (done := describe(last)) and done.best_step not in Saved(last / "checkpoints").steps():
        raise UserError(
            f"The run in {folder} is finished, but {last / 'checkpoints' / str(done.best_step)} is gone: put it back, "
            f"or delete {folder} to train it anew."
        )


def _finished_run(folder: Path, settings: dict[str, Any]) -> Run | None:
    """The run in a folder if it is finished; its settings are kept or compared."""
    done = (folder / "results.json").is_file()
    if not done:  # the stages watch over their own settings; those of the final evaluation may still change
        (folder / "settings.json").unlink(missing_ok=True)
    keep_settings(folder, settings)
    return schema.read_run(folder) if done else None


def _prompt_per_task(
    session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree, run: TrackedRun
) -> tuple[trees.Tree, dict[str, Path]]:
    """A prompt for each task of the mixture: from `prompt_path` where it names the task, otherwise trained on it alone.

    Returns:
        The prompts by task, and the folder of each stage that trained one.
    """
    from promot_jax.data.examples import task_names

    experiment = session.experiment
    if isinstance(experiment.prompt_path, str) and experiment.prompt_path:
        raise UserError('Prompts of several tasks are given by name: PROMPT_PATH = {"task": "runs/..."}.')
    paths = experiment.prompt_path or {}
    found: trees.Tree = task_prompts(session) if paths else {}
    folders: dict[str, Path] = {}
    for task in task_names(experiment.task):
        if task in found:
            print(f"[{stage.name}] takes the prompt of {task} from {paths[task]}.", flush=True)
            continue
        alone, folders[task] = narrowed(session, task), folder / task
        begun = {"model": params["model"], "prompt": fresh_prompt(alone, stage)}
        found[task] = run_stage(alone, folders[task], stage, training, begun, run)["prompt"][task]
    return found, folders
