"""A session: an experiment with its model loaded, and what turns text into ids, text into text, tasks into scores."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax

from promot_jax import trees
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments import data_check, early_checks
from promot_jax.experiments.settings import Experiment
from promot_jax.methods.base import Method, Stage
from promot_jax.params import soft_prompts
from promot_jax.params.soft_prompts import PromptInit
from promot_jax.training.settings import Tuning

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.data.chat import ChatTemplate
    from promot_jax.data.encoding import Encoder
    from promot_jax.evaluation.evaluator import Evaluator
    from promot_jax.evaluation.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Session:
    """An experiment and its loaded model: what the stages and methods of one process share."""

    experiment: Experiment
    base: Pretrained  # model and tokenizer
    sampler: "Sampler"  # text in, text out, as the experiment's evaluation decodes

    @functools.cached_property
    def evaluator(self) -> "Evaluator":
        """Evaluates the experiment's tasks; the base model's ICL scores are computed once for all its callers."""
        from promot_jax.evaluation.evaluator import Evaluator

        return Evaluator(self.sampler, task=self.experiment.task, icl=self.experiment.icl_mixture)

    def encoder(self, prompt: trees.Tree | None = None) -> "Encoder":
        """Text to ids; `prompt` are soft prompts by task, of which one named like the training task is the default."""
        prompt_ids = soft_prompts.layout(prompt, self.base.model.config.vocab_size)
        return self.sampler.encoder.with_prompts(prompt_ids, self.experiment.task)


def open_session(
    experiment: Experiment,
    others: Sequence[Experiment] = (),
    *,
    check: Callable[[], None] | None = None,
    reads_data: bool = True,
    trains: bool = False,
) -> Session:
    """Imports the tasks, checks their names and rows, loads the model.

    Args:
        experiment: model and data.
        others: experiments that this process will come to (`with_experiment`): their tasks may be cached ones too.
        check: called when the tasks are known and before their rows are read: the caller's own checks.
        reads_data: whether the job reads the tasks' rows; otherwise the tasks are not even imported, and `others` and
            `check` have to be left out.
        trains: whether the job trains on them: how long they are in tokens is then printed and checked.

    Raises:
        UserError: an unknown task, mixture or checkpoint, or rows that cannot be used (`data.validation`). All but the
            checkpoint is checked before the model is read.
    """
    experiments = [experiment, *others]
    if reads_data:
        check_rows(experiments, check)
    else:
        assert not others and check is None
        early_checks.check_names(experiment)
    if trains:
        text = text_of(experiment)
        for other in {one.task: one for one in reversed(experiments) if one.task}.values():
            data_check.report(data_check.with_lengths(other, text), text)
    started = time.monotonic()
    base = load_base(experiment)
    print(
        f"{experiment.checkpoint}: {trees.count(base.params):,} parameters, {base.leaves['loaded']} leaves loaded, "
        f"{base.leaves['new']} new, {base.leaves['unused']} unused, {time.monotonic() - started:.1f} s. "
        f"Base {base.base[:12]}. Devices: {jax.device_count()} {jax.devices()[0].platform}, hosts: {hosts.count()}.",
        flush=True,
    )
    return _session(experiment, base, trains)


def check_rows(experiments: Sequence[Experiment], check: Callable[[], None] | None = None) -> None:
    """Imports the tasks of experiments, checks their names and rows; arguments and errors as of `open_session`."""
    for experiment in experiments:
        check_data(experiment)
    if check:
        check()
    from promot_jax.data import caches, examples, validation

    first, tasks = experiments[0], [task for experiment in experiments for task in tasks_of(experiment)]
    folders = [first.cache_dirs] if isinstance(first.cache_dirs, str) else first.cache_dirs
    caches.use(folders, [examples.get(task) for task in tasks])
    if cached := examples.cached(tasks):
        print(f"Read from SeqIO caches: {', '.join(cached)}.", flush=True)
    for experiment in experiments:
        settings = experiment.evaluation
        trained = examples.task_names(experiment.task) if experiment.task else ()
        validation.check(tasks_of(experiment), trained, (settings.curve_split, settings.split))
        _check_shots(experiment)


def tasks_of(experiment: Experiment) -> list[str]:
    """The tasks that an experiment reads."""
    from promot_jax.data import examples

    return [task for name in (experiment.task, experiment.icl_mixture) if name for task in examples.task_names(name)]


def check_data(experiment: Experiment) -> None:
    """Imports the tasks; raises UserError for names, splits, shots and rates that would fail only after hours."""
    early_checks.check_names(experiment)
    from promot_jax.data import examples

    examples.import_tasks([experiment.modules] if isinstance(experiment.modules, str) else experiment.modules)
    if experiment.data:
        from promot_jax.tasks import data_file

        data_file.register_data(experiment.data, partial(_chat_template, experiment))
    if experiment.task:
        examples.mixing_rates(experiment.task)
    settings = experiment.evaluation
    wanted = ("train", settings.curve_split, settings.split)
    for name in tasks_of(experiment):
        for split in wanted:
            if split not in examples.get(name).splits:
                splits = ", ".join(examples.get(name).splits)
                raise UserError(f"Task {name!r} has no split {split!r} (it has {splits}); set Evaluation's splits.")
        if not examples.get(name).metric_fns:
            raise UserError(f"Task {name!r} has no metric; register it with metric_fns.")


def _check_shots(experiment: Experiment) -> None:
    """Raises UserError for a task with fewer training examples to draw exemplars from than prompts have shots."""
    from promot_jax.data import examples

    settings = experiment.evaluation
    most = max(*settings.shots, settings.curve_shots if settings.curve_examples else 0, 0)
    asked = dict.fromkeys(examples.task_names(experiment.icl_mixture), most) if experiment.icl_mixture else {}
    for name in examples.task_names(experiment.task) if experiment.task else ():
        asked[name] = max(asked.get(name, 0), examples.base_and_shots(name)[1])
    for name, shots in asked.items():
        base = examples.base_task(name)
        evaluated: set[str] = set()
        if settings.exemplars == "per_task" and shots:  # exemplars of a task are none of those that are evaluated
            for split, limit in ((settings.split, settings.examples), (settings.curve_split, settings.curve_examples)):
                evaluated |= {example.inputs for example in examples.read(base, split, limit=limit)}
        few = {example.inputs for example in examples.read(base, "train", within=8 * shots)} if shots else set()
        if (
            len(few - evaluated) < shots
            and (found := len({example.inputs for example in examples.pool(base)} - evaluated)) < shots
        ):
            raise UserError(
                f"Task {base!r} has {found} training examples to draw exemplars from, too few for {shots} shots: lower "
                "Evaluation.shots and Evaluation.curve_shots, or the shots of the task that is trained on."
            )


def check_method(experiment: Experiment, method: Method, tuning: Tuning) -> None:
    """Raises UserError for a method that lacks a setting, the mixture it needs, its text to replay, or has odd batches.

    The modules of the tasks have been imported (`check_data`).
    """
    from promot_jax.data import examples

    method.check()
    if method.needs_mixture and len(examples.task_names(experiment.task)) < 2:
        raise UserError(
            f"Method {method.name!r} trains on several tasks, but {experiment.task!r} is a single one: set "
            "MIXTURE_OR_TASK_NAME to a mixture."
        )
    for stage in method.stages:
        if stage.leaves_prompt and not stage.prompt_text:
            prompt_init(experiment, stage).check(experiment.prompt_length)
        rows = tuning.of(stage).batch_size
        for parts, what in ((experiment.partitioner.rows(), "devices"), (experiment.data_shards, "DATA_SHARDS")):
            if rows % parts and stage.candidates is None:
                raise UserError(
                    f"A batch of {rows} rows in stage {stage.name} does not divide over {parts} {what}; change "
                    "BATCH_SIZE."
                )
        for task in examples.task_names(stage.replay.task) if stage.replay else ():
            if "train" not in examples.get(task).splits:
                raise UserError(f"The replay task {task!r} has no split 'train', which is the one that is replayed.")


def prompt_init(experiment: Experiment, stage: Stage) -> PromptInit:
    """The initialiser of a stage's prompt: `Experiment.prompt_init`, with the method that the stage asks for."""
    initialiser = stage.fixed_prompt or ("text" if stage.prompt_text else experiment.prompt_init.method)
    return dataclasses.replace(experiment.prompt_init, method=initialiser)


def text_of(experiment: Experiment) -> pretrained.ModelText:
    """Tokenizer and chat template of an experiment's model, which is not loaded."""
    return pretrained.load_text(experiment.checkpoint, config=experiment.model, vocabulary=experiment.vocabulary)


def _chat_template(experiment: Experiment) -> "ChatTemplate":
    """The chat template of an experiment's model. Raises UserError for a model that has none."""
    from promot_jax.data.chat import ChatTemplate

    text = text_of(experiment)
    template = text.answers.chat_template
    source = template.get("default") if isinstance(template, dict) else template
    if not source:
        raise UserError(
            f"{experiment.checkpoint} has no chat template, which data with messages need: choose an instruct model or "
            "give data with the columns prompt and completion."
        )
    names = {number: token for token, number in text.vocabulary.control_ids.items()}
    ids = {"bos_token": text.vocabulary.bos_id, "eos_token": text.vocabulary.eos_id}
    variables = {name: names.get(number, "") if number is not None else "" for name, number in ids.items()}
    return ChatTemplate(source, tuple(names.values()), variables)


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
    return _session(experiment, session.base, trains=True)


def _session(experiment: Experiment, base: Pretrained, trains: bool) -> Session:
    from promot_jax.evaluation.sampler import Sampler

    if trains:
        text = pretrained.ModelText(base.vocabulary, base.model.continues, base.answers)
        experiment = data_check.with_lengths(experiment, text)
    return Session(experiment, base, Sampler(base, experiment.evaluation, experiment.partitioner))
