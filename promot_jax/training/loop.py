"""The one training loop: every stage of every method."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from promot_jax import trees
from promot_jax.distributed import hosts, preemption
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import PreemptedError, TrainingError
from promot_jax.methods.base import Stage
from promot_jax.models import Model
from promot_jax.params import freezing
from promot_jax.progress import live_line
from promot_jax.training.log import Log, Write, tokens_of
from promot_jax.training.profile import Profile
from promot_jax.training.settings import Training
from promot_jax.training.stage_checkpoints import StageCheckpoints
from promot_jax.training.state import build, shardings
from promot_jax.training.step import make_step

Tree = trees.Tree
Evaluate = Callable[[Tree, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage leaves."""

    params: Tree  # all of them, the trained ones from the best checkpoint
    best_step: int
    curve: list[dict[str, Any]]  # the evaluations, step 0 first
    seconds: float  # of training and evaluation, over all attempts


def train(
    folder: Path,
    model: Model,
    params: Tree,
    stage: Stage,
    training: Training,
    batches: Iterable[Tree],
    evaluate: Evaluate,
    *,
    partitioner: Partitioner,
    seed: int,
    write: Write,
    run: str = "",
) -> Trained:
    """Trains one stage, or resumes an interrupted run of it, to bitwise the same result.

    Args:
        folder: of the stage; checkpoints go to `checkpoints/`, and to `preempted/` after a notice.
        model: its dropout rate is the stage's.
        params: `{"model": ..., "prompt": {task: rows}, "lora": ...}`, on the mesh.
        stage: what is trained.
        training: how.
        batches: from step 0 on, the same at every call.
        evaluate: hook, `(params, step) -> {"target": score, ...}`: an evaluation of the curve.
        partitioner: places batches and optimizer state.
        seed: of dropout.
        write: hook, takes `(step, scalars)` of every update and evaluation.
        run: digest of the run's settings, which its checkpoints have to have.

    Returns:
        The best checkpoint's parameters, by target score on the validation split (the later of equals), and the curve.

    Raises:
        PreemptedError: after a notice or Ctrl-C; the state is saved.
        TakenOverError: another process took the folder over, or it was deleted; nothing is saved in it.
        TrainingError: the loss or the gradient is not finite.
        UserError: nothing to train, or checkpoints of another run in the folder.
    """
    # ---- the state, fresh or resumed ---------------------------------------------------------------------------------
    state, constants, rest, transform = build(model, params, stage, training, partitioner)
    _announce(stage, training, params, state.params)
    checkpoints = StageCheckpoints(folder, stage.name, keep_period=training.keep_period, run=run)
    state, progress = checkpoints.resume(state)
    done = checkpoints.step
    update = make_step(model, transform, stage, training, shardings(state))
    key = jax.random.key(seed)
    profile = Profile(folder, stage.name, training.profile)

    # ---- evaluate, save ----------------------------------------------------------------------------------------------
    def due(step: int) -> bool:
        return step % training.eval_period == 0 or step == training.steps

    def measure(step: int, loss: float | None, current: Tree) -> None:
        entry = {"step": step, "stage": stage.name, "loss": loss, **evaluate(current, step)}
        progress.curve.append(entry)
        log.evaluation(step, entry)

    def evaluate_and_save(step: int) -> None:
        try:
            measure(step, sum(progress.losses) / len(progress.losses), trees.merge(state.params, rest))
        except PreemptedError:
            checkpoints.preempt(step, state, progress)
        progress.losses = []
        checkpoints.save(step, state, progress)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    with preemption.saving(), live_line.part() as line:
        log = Log(stage.name, training, write, line)
        log.starts(done, progress.curve[-1] if progress.curve else None)
        if done == 0:
            measure(0, None, params)
        elif progress.losses and due(done):  # preempted in this evaluation
            evaluate_and_save(done)
        log.starts(done, progress.curve[-1])
        for step, batch in enumerate(hosts.timely(batches, "the next batch"), 1):
            if step <= done:
                log.restart()
                continue  # the stream is replayed, so that a resumed run sees the batches of an uninterrupted one
            if step > training.steps:
                break
            tokens = tokens_of(batch)
            with profile.step(step):
                state, metrics = update(state, constants, partitioner.batch(batch), key)
                scalars = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, scalars.values())):
                raise _not_finite(stage.name, step, scalars, checkpoints)
            progress.losses.append(scalars["loss"])
            log.update(step, scalars, tokens)
            if due(step):
                evaluate_and_save(step)
                log.evaluated(step, progress.curve[-1])
            if preemption.stops():
                checkpoints.preempt(step, state, progress)

    # ---- the best checkpoint -----------------------------------------------------------------------------------------
    candidates = [entry for entry in progress.curve if entry["step"] > 0]
    best = max(candidates, key=lambda entry: (entry["target"], entry["step"]))["step"]
    flat = trees.flatten(params)
    trained = trees.flatten(checkpoints.finish(best, state.params))
    flat |= {path: leaf.astype(flat[path].dtype) for path, leaf in trained.items()}
    return Trained(trees.unflatten(flat), best, progress.curve, progress.spent())


def _announce(stage: Stage, training: Training, params: Tree, trained: Tree) -> None:
    total, moving = trees.count(params), freezing.count(trained, training.freeze)
    frozen = len(trees.flatten(params)) - len(trees.flatten(trained))
    print(
        f"[{stage.name}] trains {moving:,} of {total:,} parameters ({100 * moving / total:.3f} %), "
        f"{frozen} leaves frozen.",
        flush=True,
    )


def _not_finite(name: str, step: int, scalars: dict[str, float], checkpoints: StageCheckpoints) -> TrainingError:
    newest = checkpoints.newest()
    where = f"the last good checkpoint is {newest}" if newest else "no checkpoint yet"
    return TrainingError(
        f"[{name}] the loss, its gradient or the update is not finite at step {step} (loss {scalars['loss']}, gradient "
        f"norm {scalars['grad_norm']}); {where}. Lower LEARNING_RATE or set clip_norm, with another --workdir."
    )
