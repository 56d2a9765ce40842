"""One stage of a run on a loaded model, in a folder of its own; its best checkpoint is handed over."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promot_jax import files, trees
from promot_jax.checkpoints import stage_folder
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.data.packing import PackedBatches
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments import given_targets, hooks
from promot_jax.experiments.final_evaluation import settings_of
from promot_jax.experiments.resume_guard import keep_settings, shared_settings
from promot_jax.experiments.session import Session, prompt_init
from promot_jax.experiments.train_stream import stage_batches
from promot_jax.methods.base import Candidates, Stage
from promot_jax.models import build
from promot_jax.params import soft_prompts
from promot_jax.params.fingerprint import fingerprint
from promot_jax.results import records
from promot_jax.results.schema import StageRecord
from promot_jax.results.scores import StepEvaluation
from promot_jax.trackers.run import TrackedRun
from promot_jax.trackers.writer import Writer
from promot_jax.training.loop import Trained, train
from promot_jax.training.settings import Training

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.data.exemplars import WithExemplars
    from promot_jax.experiments.train_stream import Stream

Json = dict[str, Any]


def run_stage(
    session: Session,
    folder: Path,
    stage: Stage,
    training: Training,
    params: trees.Tree,
    tracked: TrackedRun | None = None,
) -> trees.Tree:
    """Trains one stage in its folder, or takes it from there when it is finished.

    It starts from `params`, `{"model": ..., "prompt": {task: rows}, "lora": ...}`, and returns all of them, the trained
    ones from the stage's best checkpoint. `tracked` is the run that it is a stage of; None for TensorBoard alone.
    """
    attached = {"model": True, "prompt": stage.prompt, "lora": stage.lora}
    params = {subtree: tree for subtree, tree in params.items() if attached[subtree]}
    settings = _settings(session, stage, training, params)
    run = hosts.decide(lambda: keep_settings(folder, settings, stage_folder.STAGE_FILE), "the settings")
    finished = records.decide(lambda: stage_folder.describe(folder), StageRecord, "a finished stage")
    if finished:
        if stage.leaves_prompt:
            hosts.decide(lambda: check_prompt(folder, again=folder), "the stage's prompt")
        print(f"[{stage.name}] is finished in {folder}.", flush=True)
        return stage_folder.overlay(folder, finished.best_step, params)
    left_out: dict[str, int] = {}
    with (tracked or TrackedRun(folder)).stage(folder, stage.name) as writer:
        if stage.candidates is not None:
            trained = _choose(session, folder, stage, stage.candidates, params, writer, run)
        else:
            trained, left_out = _train(session, folder, stage, training, params, writer, run)
    curve = records.parse(trained.curve, list[StepEvaluation], f"The curve of {stage.name}")
    score = next(entry.target for entry in curve if entry.step == trained.best_step)
    assert score is not None  # every evaluation scores the target
    if stage.leaves_prompt:
        _save_prompt(session, folder, stage, trained, score)
    record = StageRecord(
        stage=stage.name,
        trains=list(stage.trains),
        checkpoint=session.experiment.checkpoint,
        base=session.base.base,
        best_step=trained.best_step,
        steps=0 if stage.candidates is not None else training.steps,
        score=score,
        seed=session.experiment.seed,
        seconds=trained.seconds,
        curve=curve,
        lora=files.plain(dataclasses.asdict(stage.lora)) if stage.keeps_lora and stage.lora else None,
        run=run,
        **left_out,
    )
    stage_folder.record(folder, record)
    return trained.params


def _settings(session: Session, stage: Stage, training: Training, params: trees.Tree) -> Json:
    """What a stage's result depends on: a folder that holds another's is refused."""
    shared = shared_settings(session.experiment)
    tested = session.experiment.evaluation.curve_test and stage.tunes_model  # its curve has scores of the test split
    for key in settings_of(session.experiment):  # a trained stage stays; only its final evaluation is another
        if key == "samples" or not tested:
            del shared["experiment"]["evaluation"][key]
    start = fingerprint(params)  # a prompt or model that was replaced in place is another start
    return {"stage": stage.name, "training": recorded(stage, training), "start": start, **shared}


def recorded(stage: Stage, training: Training) -> Json:
    """The settings of a stage that its result depends on, as `settings.json` holds them."""
    settings = dataclasses.asdict(training) | stage.recorded()
    if not training.dropout_rate:
        del settings["pack_batch"]  # equal to rounding either way, as meshes are
    return settings


def _train(
    session: Session,
    folder: Path,
    stage: Stage,
    training: Training,
    params: trees.Tree,
    writer: Writer,
    run: str,
) -> tuple[Trained, dict[str, int]]:
    """Runs the loop on the training stream; returns its result, and counts of what the stream left out."""
    experiment = session.experiment
    config = dataclasses.replace(session.base.model.config, dropout_rate=training.dropout_rate)
    model = build(config, experiment.partitioner)
    stage = _calibrated(session, stage, params)
    examples, stream = stage_batches(session, params.get("prompt"), model, training, stage.replay)
    if isinstance(stream, PackedBatches):
        print(f"[{stage.name}] {stream.summary()}.", flush=True)
    trained = train(
        folder,
        model,
        params,
        stage,
        training,
        stream,
        hooks.curve_evaluation(session, folder, stage, writer),
        partitioner=experiment.partitioner,
        seed=experiment.seed,
        write=writer.scalars,
        run=run,
    )
    return trained, _left_out(stage, examples, stream)


def _calibrated(session: Session, stage: Stage, params: trees.Tree) -> Stage:
    """The stage with an objective that knows the losses at its start, where it needs them."""
    objective = stage.objective
    if not objective.calibration_examples:
        return stage
    print(f"[{stage.name}] measures the loss of up to {objective.calibration_examples} examples per task.", flush=True)
    examples = given_targets.of_target(
        session, params.get("prompt"), given_targets.TRAIN, objective.calibration_examples
    )
    losses = examples.losses(params)
    if not losses:
        raise UserError(f"No training example of {session.experiment.task!r} fits: raise TASK_FEATURE_LENGTHS.")
    return dataclasses.replace(stage, objective=objective.calibrated(losses))


def _left_out(stage: Stage, examples: "Mapping[int, WithExemplars]", stream: "Stream") -> dict[str, int]:
    """Counts of the examples and exemplars that were too long, over all hosts."""
    # Hosts may have opened the same shards.
    counts = {shard: (part.skipped, examples[shard].dropped) for shard, part in stream.parts.items()}
    shards = dict(pair for pairs in hosts.gather(list(counts.items()), "the end of a stage") for pair in pairs)
    skipped, dropped = map(sum, zip(*shards.values(), strict=True))
    if skipped:
        print(f"[{stage.name}] left out {skipped} examples longer than TASK_FEATURE_LENGTHS.", flush=True)
    if dropped:
        print(f"[{stage.name}] left out {dropped} exemplars for want of room in the inputs.", flush=True)
    return {"skipped": skipped, "dropped_shots": dropped}


def _choose(
    session: Session,
    folder: Path,
    stage: Stage,
    candidates: Candidates,
    params: trees.Tree,
    writer: Writer,
    run: str,
) -> Trained:
    """Evaluates candidates between the base and the tuned model, and keeps the best; of equals that closer to the base.

    Step 0 is the base model, as on every curve, and is not chosen.
    """
    began, base = time.monotonic(), session.base.params
    evaluate = hooks.curve_evaluation(session, folder, stage, writer)
    curve: list[Json] = []
    for step, named in candidates.points().items():
        point = evaluate({"model": candidates.at(step, base, params["model"])}, step)
        curve.append({"step": step, "stage": stage.name, "loss": None, **named, **point})
        writer.scalars(step, {f"eval/{name}": value for name, value in point.items() if isinstance(value, float)})
        shown = ", ".join(f"{name} {value}" for name, value in named.items())
        print(f"[{stage.name}] {shown}: target {point['target']:.1f}", flush=True)
    best = max((point for point in curve if point["step"]), key=lambda point: (point["target"], -point["step"]))["step"]
    model = candidates.at(best, base, params["model"])
    checkpoints = Checkpoints(folder / "checkpoints", run=run)
    if checkpoints.latest() != best:
        checkpoints.save(best, {"params": {"model": model}}, {"curve": curve}, float(best))
    checkpoints.close()
    return Trained({"model": model}, best, curve, time.monotonic() - began)


def check_prompt(folder: Path, again: Path) -> None:
    """Raises UserError where the prompt of a finished stage is gone or damaged.

    `again` is the folder that has to be deleted for it to be trained again.
    """
    try:
        soft_prompts.load(folder / "prompt", (), force=True)
    except UserError as error:
        raise UserError(
            f"The stage in {folder} is finished, but: {error} Or delete {again} to train it anew."
        ) from error


def _save_prompt(session: Session, folder: Path, stage: Stage, trained: Trained, score: float) -> None:
    experiment = session.experiment
    info = soft_prompts.PromptInfo(
        task=experiment.task,
        length=len(trained.params["prompt"][experiment.task]),
        step=0 if stage.fixed_prompt else trained.best_step,
        score=score,
        initialiser=prompt_init(experiment, stage).method,
        base=session.base.fingerprint,
    )
    saved = soft_prompts.save(folder / "prompt", trained.params["prompt"][experiment.task], info)
    print(f"[{stage.name}] prompt of step {info.step} (target {score:.1f}): {saved}", flush=True)
