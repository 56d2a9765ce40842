"""A loaded model with its evaluator, and the prompts and LoRA that stages start from."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax

from promot_jax import hosts, pretrained, prompts, stages, trees
from promot_jax.errors import UserError, nearest
from promot_jax.experiment import Experiment
from promot_jax.lora import Lora
from promot_jax.pretrained import Pretrained
from promot_jax.prompts import PromptInit
from promot_jax.tuning import Tuning

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.evaluation import Evaluator


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model with its evaluator: what the stages and methods of one process share."""

    experiment: Experiment
    base: Pretrained
    evaluator: "Evaluator"


def open_session(experiment: Experiment, others: Sequence[Experiment] = ()) -> Session:
    """Imports the tasks, checks the names, loads the model.

    Args:
        experiment: model and data.
        others: experiments that this process will come to (`with_experiment`): their tasks may be cached ones too.

    Raises:
        UserError: an unknown task, mixture or checkpoint. Names are checked before the model is read.
    """
    from promot_jax.data import text

    check_data(experiment)
    folders = [experiment.cache_dirs] if isinstance(experiment.cache_dirs, str) else experiment.cache_dirs
    tasks = [task for one in (experiment, *others) for task in tasks_of(one)]
    text.use_caches(folders, tasks)
    if cached := text.cached(tasks):
        print(f"Read from SeqIO caches: {', '.join(cached)}.", flush=True)
    from promot_jax.evaluation import Evaluator

    started = time.monotonic()
    base = load_base(experiment)
    print(
        f"{experiment.checkpoint}: {trees.count(base.params):,} parameters, {base.leaves['loaded']} leaves loaded, "
        f"{base.leaves['new']} new, {base.leaves['unused']} unused, {time.monotonic() - started:.1f} s. "
        f"Base {base.base[:12]}. Devices: {jax.device_count()} {jax.devices()[0].platform}, hosts: {hosts.count()}.",
        flush=True,
    )
    evaluator = Evaluator(
        base, experiment.evaluation, experiment.partitioner, task=experiment.task, icl=experiment.icl_mixture
    )
    return Session(experiment, base, evaluator)


def tasks_of(experiment: Experiment) -> list[str]:
    """The tasks that an experiment reads."""
    from promot_jax.data import text

    return [task for name in (experiment.task, experiment.icl_mixture) if name for task in text.task_names(name)]


def check_data(experiment: Experiment) -> None:
    """Imports the tasks; raises UserError for names, splits and shots that would fail only after hours of training."""
    from promot_jax.data import text

    text.import_tasks([experiment.modules] if isinstance(experiment.modules, str) else experiment.modules)
    settings = experiment.evaluation
    wanted = ("train", settings.curve_split, settings.split)
    for name in tasks_of(experiment):
        for split in wanted:
            if split not in text.get(name).splits:
                splits = ", ".join(text.get(name).splits)
                raise UserError(f"Task {name!r} has no split {split!r} (it has {splits}); set Evaluation's splits.")


def check_method(experiment: Experiment, method: str, tuning: Tuning) -> None:
    """Raises UserError for a method that lacks a setting, the mixture it needs, or its text to replay.

    The modules of the tasks have been imported (`check_data`).
    """
    from promot_jax.data import text

    if method in stages.MULTITASK and len(text.task_names(experiment.task)) < 2:
        raise UserError(
            f"Method {method!r} trains on several tasks, but {experiment.task!r} is a single one: set "
            "MIXTURE_OR_TASK_NAME to a mixture."
        )
    for stage in stages.method(method):
        replay = tuning.of(stage).replay
        for task in text.task_names(replay.task) if replay else ():
            if "train" not in text.get(task).splits:
                raise UserError(f"The replay task {task!r} has no split 'train', which is the one that is replayed.")


def load_base(experiment: Experiment) -> Pretrained:
    """The model that an experiment starts from."""
    return pretrained.load(
        experiment.checkpoint,
        experiment.partitioner,
        config=experiment.model,
        vocabulary=experiment.vocabulary,
        dtype=experiment.dtype,
    )


def narrowed(session: Session, task: str) -> Session:
    """The session on one task of its mixture."""
    return with_experiment(session, dataclasses.replace(session.experiment, task=task))


def with_experiment(session: Session, experiment: Experiment) -> Session:
    """The session with another task, seed or evaluation; the model stays the loaded one."""
    from promot_jax.evaluation import Evaluator

    evaluator = Evaluator(
        session.base, experiment.evaluation, experiment.partitioner, task=experiment.task, icl=experiment.icl_mixture
    )
    return Session(experiment, session.base, evaluator)


# ---- prompts and LoRA ------------------------------------------------------------------------------------------------


def fresh_prompt(session: Session, initialiser: PromptInit | None = None) -> trees.Tree:
    """The first prompt of the training task, on the mesh; `Experiment.prompt_init`'s unless an initialiser is given."""
    from promot_jax.data import text

    experiment, base = session.experiment, session.base
    labels: list[str] = []
    for task in text.task_names(experiment.task):
        labels += [label for example in text.read(task, "train", within=1) for label in example.labels]
    key = jax.random.fold_in(jax.random.key(experiment.seed), 1)
    rows = (initialiser or experiment.prompt_init).rows(
        key,
        experiment.prompt_length,
        (base.model.config.vocab_size, base.model.config.emb_dim),
        partial(base.model.input_rows, base.params),
        base.vocabulary.encode,
        list(dict.fromkeys(labels)),
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
    if isinstance(given, str):
        array, info = prompts.load(given, base.accepts, experiment.force_prompt)
        loaded = {info.task: array}
    else:
        loaded = {name: prompts.load(path, base.accepts, experiment.force_prompt)[0] for name, path in given.items()}
    width = base.model.config.emb_dim
    for name, array in loaded.items():
        if array.shape[1] != width:
            raise UserError(f"The prompt {name!r} has rows of {array.shape[1]}, the model of {width}.")
    return loaded


def task_prompts(session: Session) -> trees.Tree:
    """The prompts of `prompt_path` for training behind them: a single one for the task whatever its name is.

    Raises:
        UserError: one of several that is named like none of the tasks, so that no example would stand behind it.
    """
    from promot_jax.data import text

    experiment = session.experiment
    saved = saved_prompts(session)
    if isinstance(experiment.prompt_path, str):
        return {experiment.task: next(iter(saved.values()))}
    known = {experiment.task, *text.task_names(experiment.task)}
    for name in saved:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"PROMPT_PATH names {name!r}, which is no task of {experiment.task!r}{hint}.")
    return saved


def prompts_of_tasks(experiment: Experiment, prompt: Mapping[str, Any] | None) -> dict[str, str]:
    """Which prompt each task of the training mixture stands behind: its own, the mixture's, or "" for none."""
    from promot_jax.data import text

    held = prompt or {}
    shared = experiment.task if experiment.task in held else ""
    return {task: task if task in held else shared for task in text.task_names(experiment.task)}
