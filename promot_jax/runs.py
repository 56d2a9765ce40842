"""Stages and methods on a loaded model: each stage in a folder of its own, handed over by its best checkpoint.

What jobs need of a run is found here: `session` opens one, `closing` ends it.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from promot_jax import hosts, lora, pretrained, prompts, results, stages, trees
from promot_jax.checkpoints import Checkpoints
from promot_jax.closing import close, evaluate, settings_of
from promot_jax.errors import UserError
from promot_jax.experiment import Experiment
from promot_jax.lora import Lora
from promot_jax.models import build
from promot_jax.session import (
    Session,
    check_data,
    check_method,
    fresh_lora,
    fresh_prompt,
    load_base,
    load_prompts,
    narrowed,
    open_session,
    prompts_of_tasks,
    saved_prompts,
    task_prompts,
    tasks_of,
    with_experiment,
)
from promot_jax.stages import Stage
from promot_jax.stream import train_batches
from promot_jax.train import Trained, Training, train
from promot_jax.tuning import Tuning

__all__ = [
    "Session",
    "Tuning",
    "check_data",
    "check_method",
    "close",
    "evaluate",
    "load_base",
    "load_prompts",
    "open_session",
    "prompts_of_tasks",
    "run_method",
    "run_stage",
    "saved_prompts",
    "settings_of",
    "start",
    "task_prompts",
    "train_batches",
    "with_experiment",
]

Json = dict[str, Any]


def start(session: Session, plan: Sequence[Stage], shape: Lora | None) -> trees.Tree:
    """What the first stage of a method starts from: the base model, and the prompt and LoRA that its stages attach.

    A prompt that no stage trains is the paper's fixed random one, uniform.

    Args:
        session: model and data.
        plan: the stages.
        shape: of LoRA.
    """
    params: trees.Tree = {"model": session.base.params}
    if any(stage.prompt for stage in plan):
        chosen = session.experiment.prompt_init
        trained = any("prompt" in stage.trains for stage in plan)
        params["prompt"] = fresh_prompt(session, chosen if trained else dataclasses.replace(chosen, method="uniform"))
    if any(stage.lora for stage in plan):
        assert shape is not None  # `tuning.require`
        params["lora"] = fresh_lora(session, shape)
    return params


# ---- one stage -------------------------------------------------------------------------------------------------------


def run_stage(session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree) -> trees.Tree:
    """Trains one stage in its folder, or takes it from there when it is finished.

    Args:
        session: model and evaluator.
        folder: of the stage.
        stage: what is trained.
        training: how.
        params: `{"model": ..., "prompt": {task: rows}, "lora": ...}` to start from.

    Returns:
        All parameters, the trained ones from the stage's best checkpoint.
    """
    experiment = session.experiment
    attached = {"model": True, "prompt": stage.prompt, "lora": stage.lora}
    params = {room: tree for room, tree in params.items() if attached[room]}
    shared = _shared(experiment)
    for key in settings_of(experiment):  # training may be kept
        del shared["experiment"]["evaluation"][key]
    own = dataclasses.asdict(training)
    begun = trees.fingerprint(params)  # a prompt or model that was replaced in place is another start
    settings = {"stage": stage.name, "training": own, "start": begun, **shared}
    hosts.decide(lambda: keep_settings(folder, settings), "the settings")
    finished = hosts.decide(lambda: pretrained.describe(folder), "a finished stage")
    if finished:
        print(f"[{stage.name}] is finished in {folder}.", flush=True)
        return pretrained.overlay(folder, finished["best_step"], params)
    measure = _measure(session, folder, stage, training)
    left_out: Json = {}
    if stage is stages.WISE_FT:
        trained = _interpolate(session, folder, training, params, measure)
    else:
        trained, left_out = _train(session, folder, stage, training, params, measure)
    score = next(point["target"] for point in trained.curve if point["step"] == trained.best_step)
    if "prompt" in stage.trains or stage is stages.RANDOM_PROMPT:
        _save_prompt(session, folder, stage, trained, score)
    description = {
        "stage": stage.name,
        "trains": stage.trains,
        "checkpoint": experiment.checkpoint,
        "base": session.base.base,
        "best_step": trained.best_step,
        "steps": 0 if stage is stages.WISE_FT else training.steps,
        "score": score,
        "seed": experiment.seed,
        "seconds": trained.seconds,
        **left_out,
        "curve": trained.curve,
    }
    if stage.keeps_lora:
        description["lora"] = own["lora"]
    pretrained.record(folder, results.plain(description))
    return trained.params


Measure = Callable[[trees.Tree, int], Json]


def _measure(session: Session, folder: Path, stage: Stage, training: Training) -> Measure:
    """What evaluates a checkpoint on the validation split, `(params, step)` to the scores of a curve's point."""
    from promot_jax.evaluation import write_rows

    settings = session.experiment.evaluation

    def measure(current: trees.Tree, step: int) -> Json:
        names = prompts_of_tasks(session.experiment, current.get("prompt"))
        whole = lora.merge(current, training.lora)
        target = session.evaluator.target(whole, settings.curve_split, settings.curve_target_examples, names)
        rows = [{"step": step, **row} for row in target.rows]
        point: Json = {"target": target.entry["score"]} | {f"target_{key}": target.entry[key] for key in ("ci95", "n")}
        if settings.curve_examples and session.experiment.icl_mixture and stage.tunes_model:
            plain = whole if stage.keeps_lora else {"model": current["model"]}
            icl, more = session.evaluator.icl(
                plain,
                settings.curve_shots,
                settings.curve_split,
                settings.curve_examples,
                intervals=False,
                draws=settings.curve_draws,
            )
            point |= {"icl": icl["norm_avg"], "format_share": icl["format_share"]}
            point |= {key: icl[key] for key in ("tasks", "draws") if key in icl}
            rows += [{"step": step, **row} for row in more]
        write_rows(folder / "outputs" / f"step_{step:06d}.jsonl", rows)
        return point

    return measure


def _train(
    session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree, measure: Measure
) -> tuple[Trained, Json]:
    """Runs the loop on the training stream; returns what it leaves, and counts of what the stream left out."""
    experiment = session.experiment
    config = dataclasses.replace(session.base.model.config, dropout_rate=training.dropout_rate)
    model = build(config, experiment.partitioner)
    examples, stream = train_batches(
        session,
        params.get("prompt"),
        batch_size=training.batch_size,
        layout=model.layout,
        pack=training.pack,
        generic=training.replay,
    )
    with _events(folder) as write:
        trained = train(
            folder,
            model,
            params,
            stage,
            training,
            stream,
            measure,
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
    return trained, {"skipped": skipped, "dropped_shots": dropped}


@contextlib.contextmanager
def _events(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Gives what writes `(step, scalars)` for TensorBoard, on the host that writes.

    Closed, which writes it all, also where training fails: then the last points matter most.
    """
    from tensorboard.summary import Writer

    if not hosts.is_writer():
        yield lambda step, scalars: None
        return
    with contextlib.closing(Writer(str(folder / "events"))) as events:

        def write(step: int, scalars: dict[str, float]) -> None:
            for tag, value in scalars.items():
                events.add_scalar(tag, value, step)

        yield write


def _interpolate(session: Session, folder: Path, training: Training, params: trees.Tree, measure: Measure) -> Trained:
    """WiSE-FT (Wortsman et al., 2022): evaluates `(1 - alpha) * base + alpha * fine-tuned`, and keeps the best.

    A point's `step` is alpha in percent: step 0 is the base model, as on every curve.
    """
    began, base = time.monotonic(), session.base.params
    alphas = sorted({*training.alphas})
    if not any(alphas):
        raise UserError(f"Tuning.alphas is {training.alphas}: give at least one above 0.")
    mixed = {round(100 * alpha): alpha for alpha in alphas}
    if len(mixed) < len(alphas):
        raise UserError(f"Tuning.alphas differ by at least 0.01, unlike {training.alphas}.")
    curve: list[Json] = []
    for step, alpha in mixed.items():
        point = measure({"model": trees.interpolate(base, params["model"], alpha) if alpha else base}, step)
        curve.append({"step": step, "stage": stages.WISE_FT.name, "loss": None, "alpha": alpha, **point})
        print(f"[{stages.WISE_FT.name}] alpha {alpha}: target {point['target']:.1f}", flush=True)
    best = max((point for point in curve if point["step"]), key=lambda point: (point["target"], -point["step"]))["step"]
    model = trees.interpolate(base, params["model"], mixed[best])
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest() != best:
        checkpoints.save(best, {"params": {"model": model}}, {"curve": curve}, float(best))
    checkpoints.close()
    return Trained({"model": model}, best, curve, time.monotonic() - began)


def _save_prompt(session: Session, folder: Path, stage: Stage, trained: Trained, score: float) -> None:
    experiment = session.experiment
    fixed = "prompt" not in stage.trains
    info = prompts.PromptInfo(
        task=experiment.task,
        length=experiment.prompt_length,
        step=0 if fixed else trained.best_step,
        score=score,
        initialiser="uniform" if fixed else experiment.prompt_init.method,
        base=session.base.fingerprint,
    )
    saved = prompts.save(folder / "prompt", trained.params["prompt"][experiment.task], info)
    print(f"[{stage.name}] prompt of step {info.step} (target {score:.1f}): {saved}", flush=True)


# ---- one method ------------------------------------------------------------------------------------------------------


def run_method(session: Session, folder: Path, method: str, tuning: Tuning) -> Json:
    """Runs the stages of a method, each from the best checkpoint of the one before, strips the prompt and evaluates.

    Args:
        session: model and evaluator.
        folder: of the run; a finished run in it is returned as it is.
        method: a key of `stages.METHODS`.
        tuning: settings of its stages.

    Returns:
        The run, as `results.json` holds it.

    Raises:
        UserError: a setting that the method needs is missing, or it needs a mixture and has none.
    """
    plan = stages.method(method)
    check_method(session.experiment, method, tuning)
    tuned = {stage.name: dataclasses.asdict(tuning.of(stage)) for stage in plan}
    settings = {"method": method, "tuning": tuned, **_shared(session.experiment)}
    done = hosts.decide(lambda: _finished_run(folder, settings), "a finished run")
    if done:
        print(f"[{method}] is finished in {folder}.", flush=True)
        return done
    if plan:
        session.evaluator.check_queries()
    shape = next((tuning.of(stage).lora for stage in plan if stage.lora), None)
    params = start(session, [] if any(stage.per_task for stage in plan) else plan, shape)
    folders: dict[str, Path] = {}
    for stage in plan:
        if stage.per_task:
            params["prompt"], found = _prompt_per_task(session, folder / stage.name, stage, tuning.of(stage), params)
            folders |= {f"{stage.name}/{task}": path for task, path in found.items()}
            continue
        folders[stage.name] = folder / stage.name
        params = run_stage(session, folders[stage.name], stage, tuning.of(stage), params)
    keeps = any(stage.keeps_lora for stage in plan)
    return close(session, folder, method, params, folders, shape=shape, keeps_lora=keeps)


def _finished_run(folder: Path, settings: Json) -> Json | None:
    """The run in a folder if it is finished; its settings are kept or compared."""
    done = (folder / "results.json").is_file()
    if not done:  # the stages watch over their own settings; those of the closing evaluation may still change
        (folder / "settings.json").unlink(missing_ok=True)
    keep_settings(folder, settings)
    return results.read(folder) if done else None


def _prompt_per_task(
    session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree
) -> tuple[trees.Tree, dict[str, Path]]:
    """A prompt for each task of the mixture: from `prompt_path` where it names the task, otherwise trained on it alone.

    Returns:
        The prompts by task, and the folder of each stage that trained one.
    """
    from promot_jax.data import text

    experiment = session.experiment
    if isinstance(experiment.prompt_path, str) and experiment.prompt_path:
        raise UserError('Prompts of several tasks are given by name: PROMPT_PATH = {"task": "runs/..."}.')
    paths = experiment.prompt_path or {}
    found: trees.Tree = task_prompts(session) if paths else {}
    folders: dict[str, Path] = {}
    for task in text.task_names(experiment.task):
        if task in found:
            print(f"[{stage.name}] takes the prompt of {task} from {paths[task]}.", flush=True)
            continue
        alone, folders[task] = narrowed(session, task), folder / task
        begun = {"model": params["model"], "prompt": fresh_prompt(alone)}
        found[task] = run_stage(alone, folders[task], stage, training, begun)["prompt"][task]
    return found, folders


# ---- settings --------------------------------------------------------------------------------------------------------


def _shared(experiment: Experiment) -> Json:
    """The settings of an experiment that its results depend on."""
    from promot_jax.data import text

    shared = dataclasses.asdict(experiment)
    # A run may go on on another mesh, and where the tasks are imported from changes nothing.
    del shared["partitioner"], shared["modules"]
    # Nor does where a cache lies; but a task that has one is read in another order.
    del shared["cache_dirs"]
    if cached := text.cached(tasks_of(experiment)):
        shared["cached"] = cached
    return {"experiment": shared}


# Settings younger than some runs, with the value that those were done with.
YOUNGER = {
    "alphas": [],
    "kl": 0.0,
    "l2sp": 0.0,
    "data_shards": 1,
    "curve_draws": 1,
    "exemplar_draws": 1,
    "weight_dtype": "float32",
    "samples": 5,
}


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
        name = key.rpartition("/")[2]
        if key not in before and name in YOUNGER:
            before[key] = YOUNGER[name]
        if before.get(key) != now.get(key) and not key.endswith(("/log_period", "/keep_period")):
            raise UserError(
                f"{folder} was started with {key} = {before.get(key)}, now it is {now.get(key)}: give another "
                "--workdir, or delete the folder to start again."
            )
