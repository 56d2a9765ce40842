"""What a user can run: a stage, a method, methods compared, ICL evaluation, inference, export, gradient alignment.

Jobs are plain functions of plain settings; `main` binds them from gin files.
"""

from pathlib import Path

from promot_jax.errors import UserError, nearest
from promot_jax.experiments.final_evaluation import close, settings_of
from promot_jax.experiments.initial_params import start, task_prompts
from promot_jax.experiments.method import run_method
from promot_jax.experiments.resume_guard import YOUNGER, earlier_run
from promot_jax.experiments.session import open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.experiments.stage import run_stage
from promot_jax.methods import stages
from promot_jax.report.terminal import print_table, write_and_print
from promot_jax.results import records
from promot_jax.results.schema import Run
from promot_jax.training.settings import Training
from promot_jax.training.tuning import Tuning, require


def train_stage(workdir: Path, experiment: Experiment, stage: str, training: Training) -> None:
    """Job: trains one stage and evaluates what it leaves.

    Args:
        workdir: of the run.
        experiment: model and data; stage 2 takes its prompt, or one for each task of a mixture, from `prompt_path`.
        stage: "stage1" (prompt tuning), "stage2" (model tuning behind frozen prompts), "finetune", or another one that
            is a whole method.
        training: how.

    Raises:
        UserError: an unknown stage, a stage 2 without a prompt, or a rival without the setting that makes it one.
    """
    plan = {stages.STAGE2.name: ("promot", stages.STAGE2)}
    for name, all_ in stages.METHODS.items():
        if len(all_) == 1:
            plan.setdefault(all_[0].name, (name, all_[0]))
    if stage not in plan:
        raise UserError(f"Unknown stage {stage!r}{nearest(stage, plan)}.")
    method, chosen = plan[stage]
    require(chosen, training)
    if chosen is stages.STAGE2 and not experiment.prompt_path:
        raise UserError("Stage 2 needs a trained prompt: set PROMPT_PATH to a prompt.npy or to stage 1's folder.")
    session = open_session(experiment)
    session.evaluator.check_queries()
    if chosen is stages.STAGE2:
        params = {"model": session.base.params, "prompt": task_prompts(session)}
    else:
        params = start(session, [chosen], training.lora)
    params = run_stage(session, workdir, chosen, training, params)
    run = records.decide(lambda: earlier_run(workdir, method), Run, "an earlier run")
    if run is None:
        shape, keeps = training.lora, chosen.keeps_lora
        run = close(session, workdir, method, params, {stage: workdir}, shape=shape, keeps_lora=keeps)
    for key, value in settings_of(experiment).items():
        if (was := run.settings.get(key, YOUNGER.get(key))) != value:
            raise UserError(
                f"{workdir} was evaluated with {key} = {was}, now it is {value}: give another --workdir, or delete its "
                "results.json to evaluate it again."
            )
    print_table([run])


def promot(workdir: Path, experiment: Experiment, tuning: Tuning) -> None:
    """Job: ProMoT end to end: pretrained evaluation, stage 1, stage 2, strip, evaluation, report."""
    session = open_session(experiment)
    finished = [
        run_method(session, workdir / "pretrained", "pretrained", tuning),
        run_method(session, workdir, "promot", tuning),
    ]
    write_and_print(workdir, finished)


def train_method(workdir: Path, experiment: Experiment, tuning: Tuning, method: str) -> None:
    """Job: one method end to end: its stages, strip, evaluation, report.

    Args:
        workdir: of the run; each stage has a folder in it.
        experiment: model and data.
        tuning: settings of the stages.
        method: a key of `stages.METHODS`.
    """
    stages.method(method)
    session = open_session(experiment)
    write_and_print(workdir, [run_method(session, workdir, method, tuning)])
