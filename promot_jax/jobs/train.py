"""Jobs that train: one stage, one method, ProMoT with the pretrained model beside it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax import files, methods
from promot_jax.config.checks import check_arguments
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.final_evaluation import close, settings_of
from promot_jax.experiments.initial_params import start, task_prompts
from promot_jax.experiments.method import check_kept, run_method
from promot_jax.experiments.resume_guard import YOUNGER, earlier_run, shared_settings
from promot_jax.experiments.session import Session, check_method, open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.experiments.stage import recorded, run_stage
from promot_jax.report.terminal import print_table, write_and_print
from promot_jax.results import records
from promot_jax.results.schema import Run
from promot_jax.trackers.run import tracked
from promot_jax.trackers.settings import Tracker
from promot_jax.training.settings import Training, Tuning


def train_stage(
    workdir: Path,
    experiment: Experiment,
    stage: str,
    training: Training,
    hyperparameters: Mapping[str, Any] | None = None,
) -> None:
    """Job: trains one stage and evaluates what it leaves.

    Args:
        workdir: of the run.
        experiment: model and data; stage 2 takes its prompt, or one for each task of a mixture, from `prompt_path`.
        stage: "stage1" (prompt tuning), "stage2" (model tuning with frozen prompts prepended), "finetune", or another
            one that can run alone (`Method.alone`).
        training: how.
        hyperparameters: of the stage's method, by name; those that are missing have its defaults.

    Raises:
        UserError: an unknown stage or hyperparameter, a stage 2 without a prompt, or a missing setting.
    """
    stages = methods.alone()
    if stage not in stages:
        raise UserError(f"Unknown stage {stage!r}{nearest(stage, stages)}.")
    found = methods.find(stages[stage])
    names = [field.name for field in dataclasses.fields(found)]
    for name in hyperparameters or {}:
        if name not in names:
            raise UserError(f"Method {found.name!r} has no hyperparameter {name!r}{nearest(name, names)}.")
    given = check_arguments("train_stage.hyperparameters", found, hyperparameters or {})
    tuning = Tuning(training, training, given)
    configured = found(**given)
    configured.check()
    chosen = configured.alone
    assert chosen is not None  # `methods.alone`
    training = tuning.of(chosen)
    given_prompt = chosen.prompt and not chosen.fixed_prompt and "prompt" not in chosen.trains
    if given_prompt and not experiment.prompt_path:
        raise UserError("Stage 2 needs a trained prompt: set PROMPT_PATH to a prompt.npy or to stage 1's folder.")
    session = open_session(experiment, check=partial(check_method, experiment, configured, tuning), trains=True)
    session.evaluator.check_queries()
    if given_prompt:
        params = {"model": session.base.params, "prompt": task_prompts(session)}
    else:
        params = start(session, [chosen])
    run = records.decide(lambda: earlier_run(workdir, found.name), Run, "an earlier run")
    tuned = {stage: recorded(chosen, training)}
    settings = files.plain({"method": found.name, "tuning": tuned, **shared_settings(session.experiment)})
    with tracked(Tracker() if run else experiment.tracker, workdir, settings) as at_tracker:
        params = run_stage(session, workdir, chosen, training, params, at_tracker)
        if run is None:
            run = close(session, workdir, found.name, params, {stage: workdir}, chosen)
            at_tracker.final(run)
    for key, value in settings_of(experiment).items():
        if (was := run.settings.get(key, YOUNGER.get(key))) != value:
            raise UserError(
                f"{workdir} was evaluated with {key} = {was}, now it is {value}: give another --workdir, or delete its "
                "results.json to evaluate it again."
            )
    print_table([run])


def promot(workdir: Path, experiment: Experiment, tuning: Tuning) -> None:
    """Job: ProMoT end to end: pretrained evaluation, stage 1, stage 2, strip, evaluation, report."""
    check = partial(check_method, experiment, tuning.method("promot"), tuning)
    session = open_session(experiment, check=check, trains=True)
    finished = [
        run_method(session, workdir / "pretrained", "pretrained", tuning),
        _run_whole(session, workdir, "promot", tuning),
    ]
    write_and_print(workdir, finished)


def train_method(workdir: Path, experiment: Experiment, tuning: Tuning, method: str) -> None:
    """Job: one method end to end: its stages, each in a folder of its own, strip, evaluation, report.

    `method` is its name (`methods.METHODS`); with `_1shot` at the end it is trained with one exemplar in front of every
    input, in inputs with room for another input and a target.
    """
    name, shots = methods.parse(method)
    methods.find(name)
    experiment = experiment.with_shots(shots)
    check = partial(check_method, experiment, tuning.method(name), tuning)
    session = open_session(experiment, check=check, trains=True)
    write_and_print(workdir, [_run_whole(session, workdir, name, tuning)])


def _run_whole(session: Session, workdir: Path, method: str, tuning: Tuning) -> Run:
    """Runs a method; of a finished run, its prompts and its model have to be there as well."""
    run = run_method(session, workdir, method, tuning)
    hosts.decide(lambda: check_kept(workdir, tuning.method(method).stages), "what the run left")
    return run
