"""Job `icl_eval`: evaluates a checkpoint on the ICL mixture, with the soft prompt stripped."""

from collections.abc import Mapping
from pathlib import Path

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.experiments.final_evaluation import evaluate
from promot_jax.experiments.initial_params import prompts_of_tasks, saved_prompts, task_prompts
from promot_jax.experiments.resume_guard import earlier_run
from promot_jax.experiments.session import open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.report.terminal import print_table
from promot_jax.results import records
from promot_jax.results.schema import Run


def icl_eval(workdir: Path, experiment: Experiment, icl_prompt: str | None = None) -> None:
    """Job: evaluates a model on the fine-tuning task and on ICL, with soft prompts where they are given.

    Args:
        workdir: of the evaluation.
        experiment: model, data and prompts. A single prompt is prepended on every task; of several by name each is
            prepended on its own task of the training mixture, as in the final evaluation of a run.
        icl_prompt: name of the prompt that is prepended on ICL tasks, "" for none; None for the only one there is.

    Raises:
        UserError: of several prompts none is chosen for the ICL tasks, or one that is not there.
    """
    given = experiment.prompt_path
    names = () if isinstance(given, str) else tuple(given)
    if icl_prompt is None and len(names) > 1 and experiment.icl_mixture:
        raise UserError(
            f"PROMPT_PATH names several prompts ({', '.join(names)}): set ICL_PROMPT to the one to prepend on ICL "
            'tasks, or to "" for none.'
        )
    records.decide(lambda: earlier_run(workdir, "icl_eval"), Run, "an earlier run")
    session = open_session(experiment)
    params: trees.Tree = {"model": session.base.params}
    name = ""
    target: str | Mapping[str, str] = ""
    if given:
        by_task = names and experiment.task
        params["prompt"] = task_prompts(session) if by_task else saved_prompts(session)
        target = name = next(iter(params["prompt"]))
        if by_task:
            target = prompts_of_tasks(experiment, params["prompt"])
    if icl_prompt and icl_prompt not in params.get("prompt", {}):
        raise UserError(f"ICL_PROMPT is {icl_prompt!r}, which is none of the prompts in PROMPT_PATH.")
    chosen = name if icl_prompt is None else icl_prompt
    run = evaluate(session, workdir, "icl_eval", params, target_prompt=target, icl_prompt=chosen, stages={})
    print_table([run])
