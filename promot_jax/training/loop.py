"""The one training loop: every stage of every method."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.checkpoints.orbax import Checkpoints, existing
from promot_jax.distributed import hosts, preemption
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import PreemptedError, TrainingError, UserError
from promot_jax.methods.base import Stage
from promot_jax.models import Model
from promot_jax.params import freezing
from promot_jax.params.dtypes import cast_weights
from promot_jax.training import optimizer as optim
from promot_jax.training.objective import START
from promot_jax.training.settings import Training
from promot_jax.training.step import held, make_step

Array = jax.Array
Tree = trees.Tree


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage leaves.

    Attributes:
        params: all parameters, the trained ones from the best checkpoint.
        best_step: of that checkpoint.
        curve: one point per evaluation, step 0 first.
        seconds: of training and evaluation, over all attempts.
    """

    params: Tree
    best_step: int
    curve: list[dict[str, Any]]
    seconds: float


def train(
    folder: Path,
    model: Model,
    params: Tree,
    stage: Stage,
    training: Training,
    batches: Iterable[Tree],
    evaluate: Callable[[Tree, int], dict[str, Any]],
    *,
    partitioner: Partitioner,
    seed: int,
    write: Callable[[int, dict[str, float]], None],
) -> Trained:
    """Trains one stage, or goes on where an interrupted run of it stopped, to bitwise the same result.

    When its machine is about to be taken away, it saves its state, evaluated or not, in `preempted/`: a checkpoint
    that only resuming looks at, so that `checkpoints/` keeps the best and the newest of those that may be chosen.

    Args:
        folder: of the stage; checkpoints go to `checkpoints/`.
        model: its dropout rate is the stage's.
        params: `{"model": ..., "prompt": {task: rows}, "lora": ...}`, on the mesh.
        stage: what is trained.
        training: how.
        batches: from step 0 on, the same at every call.
        evaluate: `(params, step) -> {"target": score, ...}`, a point of the curve.
        partitioner: places batches and optimizer state.
        seed: of dropout.
        write: takes `(step, scalars)` for TensorBoard.

    Returns:
        The best checkpoint's parameters, by target score on the validation split (the later of equals), and the curve.

    Raises:
        PreemptedError: after a notice; the state is saved.
        TrainingError: the loss or the gradient is not finite.
        UserError: nothing to train, or checkpoints of another run in the folder.
    """
    # ---- what is trained -------------------------------------------------------------------------------------------
    trained, frozen = freezing.split(params, stage.trains, training.freeze)
    if not trained:
        rooms = " and ".join(map(repr, stage.trains))
        raise UserError(f"Stage {stage.name} trains nothing: every leaf of {rooms} is frozen.")
    total, moving = trees.count(params), freezing.count(trained, training.freeze)
    print(
        f"[{stage.name}] trains {moving:,} of {total:,} parameters "
        f"({100 * moving / total:.3f} %), {len(trees.flatten(frozen))} leaves frozen.",
        flush=True,
    )
    beside = frozen
    if "model" not in trained:
        frozen = cast_weights(frozen, model.config.dtype)
        beside = beside if "lora" in params else frozen  # LoRA is merged into float32 kernels
    constants = frozen | ({START: trained.get("model", {})} if stage.uses_start else {})

    # ---- state, fresh or resumed -------------------------------------------------------------------------------------
    transform = optim.build(training.steps, training.optimizer, prompt=training.prompt_optimizer)
    trained = jax.tree.map(jnp.copy, held(trained, training))  # the state is donated; the caller keeps its own
    abstract = jax.eval_shape(transform.init, trained)
    optimizer_shardings = partitioner.like(abstract, trained)
    optimizer = jax.jit(transform.init, out_shardings=optimizer_shardings)(trained)
    state = {"params": trained, "optimizer": optimizer, "step": jnp.int32(0)}
    state["step"] = jax.device_put(state["step"], partitioner.replicated())
    checkpoints = Checkpoints(folder / "checkpoints", keep_period=training.keep_period)
    # Of one step in both, that in `checkpoints` is evaluated, too.
    newest, latest = checkpoints, checkpoints.latest()
    preempted = existing(folder / "preempted")
    if preempted is not None and (preempted.latest() or 0) > (latest or 0):
        newest, latest = preempted, preempted.latest()
    progress: dict[str, Any] = {"curve": [], "losses": [], "seconds": 0.0}
    if latest is not None:
        state, progress = newest.restore(latest, state)
        print(f"[{stage.name}] resumes from step {latest} in {newest.folder}.", flush=True)
    done = saved = latest or 0
    started = time.monotonic() - progress["seconds"]
    curve: list[dict[str, Any]] = progress["curve"]
    losses: list[float] = progress.get("losses", [])  # since the last evaluation
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = make_step(model, transform, stage, training, shardings)
    key = jax.random.key(seed)
    rate = training.optimizer.rate(training.steps)

    # ---- evaluate, save ----------------------------------------------------------------------------------------------
    def measure(step: int, loss: float | None, current: Tree) -> None:
        point = {
            "step": step,
            "stage": stage.name,
            "loss": loss,
            **evaluate(current, step),
        }
        curve.append(point)
        write(step, {f"eval/{name}": value for name, value in point.items() if isinstance(value, float)})
        shown = "  ".join(f"{name} {value:.1f}" for name, value in point.items() if isinstance(value, float))
        print(f"[{stage.name}] step {step}: {shown}", flush=True)

    def check(step: int, metrics: Tree) -> dict[str, float]:
        scalars = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, scalars.values())):
            checkpoints.wait()
            good = checkpoints.latest()
            where = f"the last good checkpoint is {checkpoints.folder / str(good)}" if good else "no checkpoint yet"
            raise TrainingError(
                f"[{stage.name}] the loss, its gradient or the update is not finite at step {step} (loss "
                f"{scalars['loss']}, gradient norm {scalars['grad_norm']}); {where}. Lower LEARNING_RATE or set "
                "clip_norm, with another --workdir."
            )
        return scalars

    def pause(step: int) -> NoReturn:
        checkpoints.close()
        if step > saved:
            store = preempted or Checkpoints(folder / "preempted")
            spent = time.monotonic() - started
            store.save(step, state, {"curve": curve, "losses": losses, "seconds": spent}, -1.0)
            store.close()
        raise PreemptedError(f"[{stage.name}] preempted; the state of step {step} is saved.")

    def evaluate_and_save(step: int) -> None:
        nonlocal losses, saved
        try:
            measure(step, sum(losses) / len(losses), trees.merge(state["params"], beside))
        except PreemptedError:
            pause(step)
        losses = []
        spent = time.monotonic() - started
        progress = {"curve": curve, "losses": losses, "seconds": spent}
        checkpoints.save(step, state, progress, float(curve[-1]["target"]))
        saved = step

    # ---- the loop ----------------------------------------------------------------------------------------------------
    if done == 0 and not curve:
        measure(0, None, params)
    if newest is preempted and losses and (done % training.eval_period == 0 or done == training.steps):
        evaluate_and_save(done)  # where it was preempted
    ticked = time.monotonic()
    for index, batch in enumerate(hosts.timely(batches, "the next batch")):
        if index < done:
            continue  # the stream is replayed, so that a resumed run sees the batches of an uninterrupted one
        if index >= training.steps:
            break
        state, metrics = step_fn(state, constants, partitioner.batch(batch), key)
        step = index + 1
        scalars = check(step, metrics)
        losses.append(scalars["loss"])
        write(step, {f"train/{name}": value for name, value in scalars.items()} | {"train/rate": float(rate(index))})
        if step % training.log_period == 0 or step == training.steps:
            pace = (time.monotonic() - ticked) / training.log_period
            left = pace * (training.steps - step)
            print(
                f"[{stage.name}] {step}/{training.steps}  loss {scalars['loss']:.4f}  "
                f"gradient {scalars['grad_norm']:.3g}  {pace:.2f} s/step  {left:.0f} s left",
                flush=True,
            )
            ticked = time.monotonic()
        if step % training.eval_period == 0 or step == training.steps:
            evaluate_and_save(step)
            ticked = time.monotonic()
        if preemption.stops():
            pause(step)
    checkpoints.wait()

    # ---- the best checkpoint -----------------------------------------------------------------------------------------
    candidates = [point for point in curve if point["step"] > 0]
    best = max(candidates, key=lambda point: (point["target"], point["step"]))["step"]
    best_params = checkpoints.parameters(best, state["params"])
    checkpoints.close()
    if preempted is not None:
        preempted.remove()
    flat = trees.flatten(params)
    flat |= {path: leaf.astype(flat[path].dtype) for path, leaf in trees.flatten(best_params).items()}
    merged = trees.unflatten(flat)
    return Trained(merged, best, curve, time.monotonic() - started)
