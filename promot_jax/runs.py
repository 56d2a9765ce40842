"""Stages and methods on a loaded model: each stage in a folder of its own, handed over by its best checkpoint."""

import contextlib
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from promot_jax import hosts, pretrained, prompts, results, stages, trees
from promot_jax.errors import UserError
from promot_jax.experiment import Experiment
from promot_jax.models import build
from promot_jax.pretrained import Pretrained
from promot_jax.stages import Stage
from promot_jax.train import Training, train

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.evaluation import Evaluator

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model with its evaluator: what the stages and methods of one process share."""

    experiment: Experiment
    base: Pretrained
    evaluator: "Evaluator"


def _tasks(experiment: Experiment) -> list[str]:
    """The tasks that an experiment reads."""
    from promot_jax.data import text

    return [task for name in (experiment.task, experiment.icl_mixture) if name for task in text.task_names(name)]


def _check_data(experiment: Experiment) -> None:
    """Raises UserError for names, splits and shots that would fail only after hours of training."""
    from promot_jax.data import text

    settings = experiment.evaluation
    wanted = ("train", settings.curve_split, settings.split)
    for name in _tasks(experiment):
        for split in wanted:
            if split not in text.get(name).splits:
                splits = ", ".join(text.get(name).splits)
                raise UserError(f"Task {name!r} has no split {split!r} (it has {splits}); set Evaluation's splits.")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the two kinds of stage train; stage 2 and standard fine-tuning share one budget and learning rate.

    Attributes:
        prompt: of stage 1.
        model: of stage 2 and of standard fine-tuning.
    """

    prompt: Training
    model: Training

    def of(self, stage: Stage) -> Training:
        """The settings of a stage."""
        return self.prompt if stage.trains == "prompt" else self.model


def open_session(experiment: Experiment) -> Session:
    """Imports the tasks, checks the names, loads the model.

    Raises:
        UserError: an unknown task, mixture or checkpoint. Names are checked before the model is read.
    """
    from promot_jax.data import text

    text.import_tasks([experiment.modules] if isinstance(experiment.modules, str) else experiment.modules)
    _check_data(experiment)
    folders = [experiment.cache_dirs] if isinstance(experiment.cache_dirs, str) else experiment.cache_dirs
    text.use_caches(folders, _tasks(experiment))
    if cached := text.cached(_tasks(experiment)):
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


def load_base(experiment: Experiment) -> Pretrained:
    """The model that an experiment starts from."""
    return pretrained.load(
        experiment.checkpoint,
        experiment.partitioner,
        config=experiment.model,
        vocabulary=experiment.vocabulary,
        dtype=experiment.dtype,
    )


def reseeded(session: Session, seed: int) -> Session:
    """The session with another seed, for exemplars too."""
    from promot_jax.evaluation import Evaluator

    experiment = session.experiment
    evaluation = dataclasses.replace(experiment.evaluation, exemplar_seed=seed)
    experiment = dataclasses.replace(experiment, seed=seed, evaluation=evaluation)
    evaluator = Evaluator(
        session.base, evaluation, experiment.partitioner, task=experiment.task, icl=experiment.icl_mixture
    )
    return Session(experiment, session.base, evaluator)


def run_stage(session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree) -> trees.Tree:
    """Trains one stage in its folder, or takes it from there when it is finished.

    Args:
        session: model and evaluator.
        folder: of the stage.
        stage: what is trained.
        training: how.
        params: `{"model": ..., "prompt": {task: rows}}` to start from.

    Returns:
        All parameters, the trained ones from the stage's best checkpoint.
    """
    from promot_jax.data import batches, fewshot, text
    from promot_jax.evaluation import write_rows

    experiment, base = session.experiment, session.base
    if not stage.prompt:
        params = {"model": params["model"]}
    shared = _shared(experiment)
    for key in closing(experiment):  # training may be kept
        del shared["experiment"]["evaluation"][key]
    start = trees.fingerprint(params)  # a prompt or model that was replaced in place is another start
    own = dataclasses.asdict(training)
    hosts.decide(
        lambda: keep_settings(folder, {"stage": stage.name, "training": own, "start": start, **shared}), "the settings"
    )
    name = experiment.task if stage.prompt else ""
    finished = hosts.decide(lambda: pretrained.describe(folder), "a finished stage")
    if finished:
        print(f"[{stage.name}] is finished in {folder}.", flush=True)
        return pretrained.overlay(folder, finished["best_step"], params)
    model = build(dataclasses.replace(base.model.config, dropout_rate=training.dropout_rate), experiment.partitioner)
    settings = experiment.evaluation

    def evaluate(current: trees.Tree, step: int) -> Json:
        target = session.evaluator.target(current, settings.curve_split, settings.curve_target_examples, name)
        rows = [{"step": step, **row} for row in target.rows]
        point: Json = {"target": target.entry["score"]} | {f"target_{key}": target.entry[key] for key in ("ci95", "n")}
        if settings.curve_examples and experiment.icl_mixture and stage.trains == "model":
            icl, more = session.evaluator.icl(
                current, settings.curve_shots, settings.curve_split, settings.curve_examples, intervals=False
            )
            point |= {"icl": icl["norm_avg"], "format_share": icl["format_share"]}
            point["tasks"] = icl["tasks"]
            rows += [{"step": step, **row} for row in more]
        write_rows(folder / "outputs" / f"step_{step:06d}.jsonl", rows)
        return point

    unprompted = session.evaluator.binding(None)
    examples: dict[int, fewshot.WithExemplars] = {}

    def open_shard(shard: int) -> batches.TrainBatches:
        examples[shard] = fewshot.WithExemplars(
            text.stream(experiment.task, "train", seed=experiment.seed, shard=shard, shards=experiment.data_shards),
            experiment.seed,
            lambda value: len(unprompted.inputs(value)),
            experiment.feature_lengths["inputs"],
        )
        return batches.TrainBatches(
            examples[shard],
            session.evaluator.binding(params.get("prompt"), name),
            model.layout,
            batch_size=training.batch_size // experiment.data_shards,
            feature_lengths=dict(experiment.feature_lengths),
            pack=training.pack,
        )

    held = experiment.partitioner.held_rows(training.batch_size)
    stream = batches.ShardedBatches(open_shard, experiment.data_shards, held)
    from tensorboard.summary import Writer

    # Closed, which writes it all, also where training fails: then the last points matter most.
    with contextlib.ExitStack() as stack:
        events = None
        if hosts.is_writer():
            events = stack.enter_context(contextlib.closing(Writer(str(folder / "events"))))

        def write(step: int, scalars: dict[str, float]) -> None:
            if events is not None:
                for tag, value in scalars.items():
                    events.add_scalar(tag, value, step)

        trained = train(
            folder,
            model,
            params,
            stage,
            training,
            stream,
            evaluate,
            partitioner=experiment.partitioner,
            seed=experiment.seed,
            write=write,
        )
    # Hosts may have opened the same shards.
    counts = {shard: (part.skipped, examples[shard].dropped) for shard, part in stream.parts.items()}
    shards = dict(pair for pairs in hosts.gather(list(counts.items()), "the end of a stage") for pair in pairs)
    skipped, dropped = map(sum, zip(*shards.values(), strict=True))
    if skipped:
        print(f"[{stage.name}] left out {skipped} examples longer than TASK_FEATURE_LENGTHS.", flush=True)
    if dropped:
        print(f"[{stage.name}] left out {dropped} exemplars for want of room in the inputs.", flush=True)
    score = next(point["target"] for point in trained.curve if point["step"] == trained.best_step)
    if stage.trains == "prompt":
        info = prompts.PromptInfo(
            task=name,
            length=experiment.prompt_length,
            step=trained.best_step,
            score=score,
            initialiser=experiment.prompt_init.method,
            base=base.fingerprint,
        )
        saved = prompts.save(folder / "prompt", trained.params["prompt"][name], info)
        print(f"[{stage.name}] prompt of step {trained.best_step} (target {score:.1f}): {saved}", flush=True)
    description = {
        "stage": stage.name,
        "trains": stage.trains,
        "checkpoint": experiment.checkpoint,
        "base": base.base,
        "best_step": trained.best_step,
        "steps": training.steps,
        "score": score,
        "seed": experiment.seed,
        "seconds": trained.seconds,
        "skipped": skipped,
        "dropped_shots": dropped,
        "curve": trained.curve,
    }
    pretrained.record(folder, results.plain(description))
    return trained.params


def run_method(session: Session, folder: Path, method: str, tuning: Tuning) -> Json:
    """Runs the stages of a method, each from the best checkpoint of the one before, strips the prompt and evaluates.

    Args:
        session: model and evaluator.
        folder: of the run; a finished run in it is returned as it is.
        method: a key of `stages.METHODS`.
        tuning: settings of its stages.

    Returns:
        The run, as `results.json` holds it.
    """
    plan = stages.method(method)
    tuned = {stage.name: dataclasses.asdict(tuning.of(stage)) for stage in plan}
    settings = {"method": method, "tuning": tuned, **_shared(session.experiment)}
    done = hosts.decide(lambda: _finished_run(folder, settings), "a finished run")
    if done:
        print(f"[{method}] is finished in {folder}.", flush=True)
        return done
    params: trees.Tree = {"model": session.base.params}
    if any(stage.prompt for stage in plan):
        params["prompt"] = fresh_prompt(session)
    for stage in plan:
        params = run_stage(session, folder / stage.name, stage, tuning.of(stage), params)
    return close(session, folder, method, params, {stage.name: folder / stage.name for stage in plan})


def _finished_run(folder: Path, settings: Json) -> Json | None:
    """The run in a folder if it is finished; its settings are kept or compared."""
    done = (folder / "results.json").is_file()
    if not done:  # the stages watch over their own settings; those of the closing evaluation may still change
        (folder / "settings.json").unlink(missing_ok=True)
    keep_settings(folder, settings)
    return results.read(folder) if done else None


def fresh_prompt(session: Session) -> trees.Tree:
    """The first prompt of the training task, on the mesh."""
    from promot_jax.data import text

    experiment, base = session.experiment, session.base
    labels: list[str] = []
    for task in text.task_names(experiment.task):
        labels += [label for example in text.read(task, "train", within=1) for label in example.labels]
    key = jax.random.fold_in(jax.random.key(experiment.seed), 1)
    rows = experiment.prompt_init.rows(
        key,
        experiment.prompt_length,
        (base.model.config.vocab_size, base.model.config.emb_dim),
        partial(base.model.input_rows, base.params),
        base.vocabulary.encode,
        list(dict.fromkeys(labels)),
    )
    return experiment.partitioner.place({"prompt": {experiment.task: rows}})["prompt"]


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


def close(session: Session, folder: Path, method: str, params: trees.Tree, trained: dict[str, Path]) -> Json:
    """Closing evaluation of a method's run: the target behind its prompt, ICL on the stripped model."""
    described = hosts.decide(
        lambda: {name: pretrained.describe(path) or {} for name, path in trained.items()}, "the finished stages"
    )
    name = session.experiment.task if "prompt" in params else ""
    return evaluate(session, folder, method, params, target_prompt=name, icl_prompt="", stages=described)


def evaluate(
    session: Session,
    folder: Path,
    method: str,
    params: trees.Tree,
    *,
    target_prompt: str,
    icl_prompt: str,
    stages: dict[str, Json],
) -> Json:
    """Scores the test split, writes `outputs/` and `results.json`, returns the run."""
    from promot_jax.evaluation import write_rows

    started = time.monotonic()
    experiment, evaluator = session.experiment, session.evaluator
    settings = experiment.evaluation
    target = None
    samples: list[Json] = []
    if experiment.task:
        scored = evaluator.target(params, settings.split, settings.target_examples, target_prompt)
        target = {"task": experiment.task, **scored.entry}
        write_rows(folder / "outputs" / "target.jsonl", scored.rows)
        samples += scored.rows[:3]
    icl = {}
    for shots in settings.shots if experiment.icl_mixture else ():
        icl[str(shots)], rows = evaluator.icl(params, shots, settings.split, settings.examples, icl_prompt)
        write_rows(folder / "outputs" / f"icl_{shots}shot.jsonl", rows)
        if shots == settings.shots[0]:
            first = {row["task"]: row for row in reversed(rows)}
            samples += list(reversed(first.values()))
    run = results.run_result(
        method,
        experiment.seed,
        {name: stage["steps"] for name, stage in stages.items()},
        sum(stage["seconds"] for stage in stages.values()) + time.monotonic() - started,
        target,
        icl,
        [point for stage in stages.values() for point in stage["curve"]],
        model=experiment.checkpoint,
        base=session.base.base,
        best_step={name: stage["best_step"] for name, stage in stages.items()},
        leaves=session.base.leaves,
        samples=[{key: _as_text(row[key]) for key in ("task", "input", "target", "output")} for row in samples],
        settings=hosts.decide(lambda: _summary(folder, stages), "the summary of settings")
        | {"curve_shots": settings.curve_shots, "dtype": experiment.dtype, **closing(experiment)},
    )
    results.write(run, folder / "results.json")
    return run


def _as_text(value: Any) -> str:
    """A post-processed target or output as a person reads it."""
    return " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def closing(experiment: Experiment) -> Json:
    """The settings of the closing evaluation alone."""
    names = ("split", "shots", "examples", "target_examples")
    return {name: results.plain(getattr(experiment.evaluation, name)) for name in names}


def _shared(experiment: Experiment) -> Json:
    """The settings of an experiment that its results depend on."""
    from promot_jax.data import text

    shared = dataclasses.asdict(experiment)
    # A run may go on on another mesh, and where the tasks are imported from changes nothing.
    del shared["partitioner"], shared["modules"]
    # Nor does where a cache lies; but a task that has one is read in another order.
    del shared["cache_dirs"]
    if cached := text.cached(_tasks(experiment)):
        shared["cached"] = cached
    return {"experiment": shared}


def keep_settings(folder: Path, settings: Json) -> None:
    """Writes the settings of a run at its start, and refuses to go on in a folder that was started with others."""
    settings = results.plain(settings)
    path = folder / "settings.json"
    if not path.is_file():
        results.write(settings, path)
        return
    try:
        before = trees.flatten(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {folder} to start again.") from error
    now = trees.flatten(settings)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not key.endswith("/log_period"):
            raise UserError(
                f"{folder} was started with {key} = {before.get(key)}, now it is {now.get(key)}: give another "
                "--workdir, or delete the folder to start again."
            )


def _summary(folder: Path, stages: dict[str, Json]) -> Json:
    """The settings that each stage was started with, flat."""
    summary: Json = {}
    for name in stages:
        nested = folder / name / "settings.json"
        path = nested if nested.is_file() else folder / "settings.json"
        training = trees.flatten(json.loads(path.read_text("utf-8"))["training"])
        summary |= {f"{name}/{key}": value for key, value in training.items()}
    return summary
