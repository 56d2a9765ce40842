"""Stages and methods on a loaded model: each stage in a folder of its own, handed over by its best checkpoint.

What jobs need of a run is found here: `session` opens one, `closing` ends it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.checkpoints import stage_folder
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments.final_evaluation import settings_of
from promot_jax.experiments.initial_params import (
    prompts_of_tasks,
)
from promot_jax.experiments.resume_guard import keep_settings, shared_settings
from promot_jax.experiments.session import (
    Session,
)
from promot_jax.experiments.train_stream import train_batches
from promot_jax.methods import stages
from promot_jax.methods.stages import Stage
from promot_jax.models import build
from promot_jax.params import lora, soft_prompts
from promot_jax.params.fingerprint import fingerprint
from promot_jax.results import records
from promot_jax.results.schema import StageRecord
from promot_jax.results.scores import StepEvaluation
from promot_jax.training.loop import Trained, train
from promot_jax.training.settings import Training

Json = dict[str, Any]


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
    shared = shared_settings(experiment)
    for key in settings_of(experiment):  # training may be kept
        del shared["experiment"]["evaluation"][key]
    own = dataclasses.asdict(training)
    begun = fingerprint(params)  # a prompt or model that was replaced in place is another start
    settings = {"stage": stage.name, "training": own, "start": begun, **shared}
    hosts.decide(lambda: keep_settings(folder, settings), "the settings")
    finished = records.decide(lambda: stage_folder.describe(folder), StageRecord, "a finished stage")
    if finished:
        print(f"[{stage.name}] is finished in {folder}.", flush=True)
        return stage_folder.overlay(folder, finished.best_step, params)
    measure = _measure(session, folder, stage, training)
    left_out: dict[str, int] = {}
    if stage is stages.WISE_FT:
        trained = _interpolate(session, folder, training, params, measure)
    else:
        trained, left_out = _train(session, folder, stage, training, params, measure)
    curve = records.parse(files.plain(trained.curve), list[StepEvaluation], f"The curve of {stage.name}")
    score = next(point.target for point in curve if point.step == trained.best_step)
    if "prompt" in stage.trains or stage is stages.RANDOM_PROMPT:
        _save_prompt(session, folder, stage, trained, score or 0.0)
    record = StageRecord(
        stage=stage.name,
        trains=list(stage.trains),
        checkpoint=experiment.checkpoint,
        base=session.base.base,
        best_step=trained.best_step,
        steps=0 if stage is stages.WISE_FT else training.steps,
        score=score,
        seed=experiment.seed,
        seconds=trained.seconds,
        curve=curve,
        lora=own["lora"] if stage.keeps_lora else None,
        **left_out,
    )
    stage_folder.record(folder, record)
    return trained.params


Measure = Callable[[trees.Tree, int], Json]


def _measure(session: Session, folder: Path, stage: Stage, training: Training) -> Measure:
    """What evaluates a checkpoint on the validation split, `(params, step)` to the scores of a curve's point."""
    settings = session.experiment.evaluation

    def measure(current: trees.Tree, step: int) -> Json:
        names = prompts_of_tasks(session.experiment, current.get("prompt"))
        whole = lora.merge(current, training.lora)
        target = session.evaluator.target(whole, settings.curve_split, settings.curve_target_examples, names)
        rows, entry = target.rows, target.entry
        point: Json = {"target": entry.score, "target_ci95": entry.ci95, "target_n": entry.n}
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
            point |= {"icl": icl.norm_avg, "format_share": icl.format_share, "tasks": icl.tasks, "draws": icl.draws}
            rows = rows + more
        outputs = [records.replace(row, step=step) for row in rows]
        files.write_rows(folder / "outputs" / f"step_{step:06d}.jsonl", outputs)
        return files.plain(point)

    return measure


def _train(
    session: Session, folder: Path, stage: Stage, training: Training, params: trees.Tree, measure: Measure
) -> tuple[Trained, dict[str, int]]:
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
    info = soft_prompts.PromptInfo(
        task=experiment.task,
        length=experiment.prompt_length,
        step=0 if fixed else trained.best_step,
        score=score,
        initialiser="uniform" if fixed else experiment.prompt_init.method,
        base=session.base.fingerprint,
    )
    saved = soft_prompts.save(folder / "prompt", trained.params["prompt"][experiment.task], info)
    print(f"[{stage.name}] prompt of step {info.step} (target {score:.1f}): {saved}", flush=True)
