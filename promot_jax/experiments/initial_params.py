"""The parameters that a method starts from: base model, fresh or saved soft prompts, fresh LoRA."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from promot_jax import trees
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.checkpoints.t5x import load as t5x
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.session import Session, prompt_init
from promot_jax.experiments.settings import Experiment
from promot_jax.methods.base import Stage
from promot_jax.params import soft_prompts
from promot_jax.params.lora import Lora


def start(session: Session, plan: Sequence[Stage]) -> trees.Tree:
    """What the first stage of a method starts from: the base model, and the prompt and LoRA that its stages attach."""
    params: trees.Tree = {"model": session.base.params}
    if any(stage.prompt for stage in plan):
        params["prompt"] = fresh_prompt(session, next(stage for stage in plan if stage.prompt))
    if shape := next((stage.lora for stage in plan if stage.lora), None):
        params["lora"] = fresh_lora(session, shape)
    return params


def fresh_prompt(session: Session, stage: Stage) -> trees.Tree:
    """The first prompt of the training task, on the mesh: the stage's own, or `Experiment.prompt_init`'s."""
    from promot_jax.data import examples

    experiment, base = session.experiment, session.base
    labels: list[str] = []
    for task in examples.task_names(experiment.task):
        labels += [label for example in examples.read(task, "train", within=1) for label in example.labels]
    labels = list(dict.fromkeys(labels))
    initialiser, length = prompt_init(experiment, stage), experiment.prompt_length
    if stage.prompt_text:
        if "{labels}" in stage.prompt_text and not labels:
            raise UserError(f"The prompt of stage {stage.name} names the labels of {experiment.task}, which has none.")
        text = stage.prompt_text.replace("{labels}", ", ".join(labels))
        initialiser, length = dataclasses.replace(initialiser, text=text), len(base.vocabulary.encode(text))
    rows = initialiser.rows(
        jax.random.fold_in(jax.random.key(experiment.seed), 1),
        length,
        (base.model.config.vocab_size, base.model.config.emb_dim),
        partial(base.model.input_rows, base.params),
        base.vocabulary.encode,
        labels,
    )
    return experiment.partitioner.place({"prompt": {experiment.task: rows}})["prompt"]


def fresh_lora(session: Session, settings: Lora) -> trees.Tree:
    """LoRA that changes nothing yet, on the mesh."""
    key = jax.random.fold_in(jax.random.key(session.experiment.seed), 2)
    return session.experiment.partitioner.place({"lora": settings.init(key, session.base.params)})["lora"]


def saved_prompts(session: Session) -> trees.Tree:
    """The prompts of `prompt_path` by name, on the mesh."""
    loaded = load_prompts(session.experiment, session.base)
    return session.experiment.partitioner.place({"prompt": loaded})["prompt"]


def load_prompts(experiment: Experiment, base: Pretrained) -> dict[str, Any]:
    """The prompts of `prompt_path` by name, `[length, embed]`.

    Raises:
        UserError: nothing there, or a prompt of another model.
    """
    given = experiment.prompt_path
    forced = experiment.force_prompt
    loaded: dict[str, Any] = {}
    for name, path in {"": given}.items() if isinstance(given, str) else given.items():
        if not name and not isinstance(given, str):
            raise UserError(f'PROMPT_PATH gives {path!r} the name ""; give it the name of its task.')
        task = name or experiment.prompt_task or (experiment.task if forced else "")
        if t5x.is_checkpoint(Path(path)):
            array = soft_prompts.checked(t5x.read_prompt(Path(path)), path)
            info = soft_prompts.undescribed(array, path, task)
        else:
            array, info = soft_prompts.load(path, base.accepts, forced, task)
        loaded[name or info.task] = array
    width = base.model.config.emb_dim
    for name, array in loaded.items():
        if array.shape[1] != width:
            raise UserError(f"The prompt {name!r} has rows of {array.shape[1]}, the model of {width}.")
    return loaded


def task_prompts(session: Session) -> trees.Tree:
    """The prompts of `prompt_path`, to be prepended in training: a single one for the task whatever its name is.

    Raises:
        UserError: one of several that is named like none of the tasks, so that no example would have it.
    """
    from promot_jax.data import examples

    experiment = session.experiment
    saved = saved_prompts(session)
    if isinstance(experiment.prompt_path, str):
        return {experiment.task: next(iter(saved.values()))}
    known = {experiment.task, *examples.task_names(experiment.task)}
    for name in saved:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"PROMPT_PATH names {name!r}, which is no task of {experiment.task!r}{hint}.")
    return saved


def prompts_of_tasks(experiment: Experiment, prompt: Mapping[str, Any] | None) -> dict[str, str]:
    """The prompt of each task of the training mixture: its own, the mixture's, or "" for none."""
    from promot_jax.data import examples

    prompts = prompt or {}
    shared = experiment.task if experiment.task in prompts else ""
    return {task: task if task in prompts else shared for task in examples.task_names(experiment.task)}
