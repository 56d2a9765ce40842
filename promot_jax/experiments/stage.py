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
from promot_jax.experiments.final_evaluation import settings_of
from promot_jax.experiments.initial_params import (
    prompts_of_tasks,
)
from promot_jax.experiments.resume_guard import keep_settings, shared_settings
from promot_jax.experiments.session import (
    Session,
)
from promot_jax.experiments.train_stream import train_batches
from promot_jax.methods.base import Candidates, Stage
from promot_jax.models import build
from promot_jax.params import lora, soft_prompts
from promot_jax.params.fingerprint import fingerprint
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
    begun = fingerprint(params)  # a prompt or model that was replaced in place is another start
    settings = {"stage": stage.name, "training": recorded(stage, training), "start": begun, **shared}
    hosts.decide(lambda: keep_settings(folder, settings), "the settings")
    finished = hosts.decide(lambda: stage_folder.describe(folder), "a finished stage")
    if finished:
        print(f"[{stage.name}] is finished in {folder}.", flush=True)
        return stage_folder.overlay(folder, finished["best_step"], params)
    measure = _measure(session, folder, stage)
    left_out: Json = {}
    if stage.candidates is not None:
        trained = _choose(session, folder, stage, stage.candidates, params, measure)
    else:
        trained, left_out = _train(session, folder, stage, training, params, measure)
    score = next(point["target"] for point in trained.curve if point["step"] == trained.best_step)
    if "prompt" in stage.trains or stage.fixed_prompt:
        _save_prompt(session, folder, stage, trained, score)
    description = {
        "stage": stage.name,
        "trains": stage.trains,
        "checkpoint": experiment.checkpoint,
        "base": session.base.base,
        "best_step": trained.best_step,
        "steps": 0 if stage.candidates is not None else training.steps,
        "score": score,
        "seed": experiment.seed,
        "seconds": trained.seconds,
        **left_out,
        "curve": trained.curve,
    }
    if stage.keeps_lora and stage.lora:
        description["lora"] = dataclasses.asdict(stage.lora)
    stage_folder.record(folder, files.plain(description))
    return trained.params


def recorded(stage: Stage, training: Training) -> Json:
    """The settings of a stage that its result depends on, as `settings.json` holds them."""
    return dataclasses.asdict(training) | stage.recorded()


Measure = Callable[[trees.Tree, int], Json]


def _measure(session: Session, folder: Path, stage: Stage) -> Measure:
    """What evaluates a checkpoint on the validation split, `(params, step)` to the scores of a curve's point."""
    from promot_jax.files import write_rows

    settings = session.experiment.evaluation

    def measure(current: trees.Tree, step: int) -> Json:
        names = prompts_of_tasks(session.experiment, current.get("prompt"))
        whole = lora.merge(current, stage.lora)
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
        generic=stage.replay,
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


def _choose(
    session: Session, folder: Path, stage: Stage, candidates: Candidates, params: trees.Tree, measure: Measure
) -> Trained:
    """Evaluates candidates between the base and the tuned model, and keeps the best; of equals that closer to the base.

    Step 0 is the base model, as on every curve, and is not chosen.
    """
    began, base = time.monotonic(), session.base.params
    curve: list[Json] = []
    for step, named in candidates.points().items():
        point = measure({"model": candidates.at(step, base, params["model"])}, step)
        curve.append({"step": step, "stage": stage.name, "loss": None, **named, **point})
        shown = ", ".join(f"{name} {value}" for name, value in named.items())
        print(f"[{stage.name}] {shown}: target {point['target']:.1f}", flush=True)
    best = max((point for point in curve if point["step"]), key=lambda point: (point["target"], -point["step"]))["step"]
    model = candidates.at(best, base, params["model"])
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest() != best:
        checkpoints.save(best, {"params": {"model": model}}, {"curve": curve}, float(best))
    checkpoints.close()
    return Trained({"model": model}, best, curve, time.monotonic() - began)


def _save_prompt(session: Session, folder: Path, stage: Stage, trained: Trained, score: float) -> None:
    experiment = session.experiment
    info = soft_prompts.PromptInfo(
        task=experiment.task,
        length=experiment.prompt_length,
        step=0 if stage.fixed_prompt else trained.best_step,
        score=score,
        initialiser=stage.fixed_prompt or experiment.prompt_init.method,
        base=session.base.fingerprint,
    )
    saved = soft_prompts.save(folder / "prompt", trained.params["prompt"][experiment.task], info)
    print(f"[{stage.name}] prompt of step {info.step} (target {score:.1f}): {saved}", flush=True)
