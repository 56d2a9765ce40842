"""The one training loop: every stage of every method."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from promot_jax import freezing, hosts, lora, optim, preemption, prompts, trees
from promot_jax.checkpoints import Checkpoints, existing
from promot_jax.errors import PreemptedError, TrainingError, UserError, nearest
from promot_jax.lora import Lora
from promot_jax.losses import chunked_cross_entropy, chunked_divergence
from promot_jax.models import Model
from promot_jax.optim import Optimizer
from promot_jax.partitioning import Partitioner
from promot_jax.pretrained import cast_weights
from promot_jax.replay import Replay
from promot_jax.stages import Stage

Array = jax.Array
Tree = trees.Tree

WEIGHT_DTYPES = ("float32", "bfloat16")
_ROUNDING = 1  # folded into a step's key, whose other use is dropout


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how a stage trains.

    Attributes:
        steps: updates.
        batch_size: rows of one update, over all devices.
        eval_period: updates between evaluations; each writes a checkpoint.
        optimizer: optimizer and schedule.
        dropout_rate: on activations.
        label_smoothing: share of the target's probability spread over the vocabulary.
        microbatches: parts a batch is worked through in, their gradients added up.
        weight_dtype: of the kernels and embeddings that are trained, between updates: "float32", or "bfloat16" for half
            of their memory, with updates rounded at random (`optim.apply_updates`).
        freeze: patterns over parameter paths that stay as they are (`model/token_embedder/.*`), also of single layers
            of a stack (`model/decoder/layers_[0-5]/.*`).
        pack: several examples per row, each behind its own prompt.
        log_period: updates between progress lines.
        keep_period: updates between checkpoints that stay for later analyses, a multiple of `eval_period`; 0 keeps only
            the newest and the best.
        prompt_optimizer: of a prompt that is trained together with the model; None for `optimizer`.
        lora: of a stage with LoRA.
        l2sp: weight of half the squared distance to the parameters at the stage's start (L2-SP, Li et al., 2018),
            beside the loss per target token; 0 is off.
        kl: weight of the divergence from the model at the stage's start, per target token; 0 is off.
        replay: generic text among the examples; None for none.
        alphas: of a stage that interpolates weights (WiSE-FT, Wortsman et al., 2022): shares of the tuned model.
    """

    steps: int
    batch_size: int
    eval_period: int
    optimizer: Optimizer
    dropout_rate: float = 0.0
    label_smoothing: float = 0.0
    microbatches: int = 1
    weight_dtype: str = "float32"
    freeze: tuple[str, ...] = ()
    pack: bool = False
    log_period: int = 10
    keep_period: int = 0
    prompt_optimizer: Optimizer | None = None
    lora: Lora | None = None
    l2sp: float = 0.0
    kl: float = 0.0
    replay: Replay | None = None
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be trained with."""
        if min(self.steps, self.batch_size, self.eval_period, self.microbatches, self.log_period) < 1:
            raise UserError("steps, batch_size, eval_period, microbatches and log_period must be at least 1.")
        if self.batch_size % self.microbatches:
            raise UserError(f"BATCH_SIZE {self.batch_size} does not divide into {self.microbatches} microbatches.")
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise UserError(f"Unknown weight_dtype {self.weight_dtype!r}{nearest(self.weight_dtype, WEIGHT_DTYPES)}.")
        if self.keep_period < 0 or self.keep_period % self.eval_period:
            raise UserError(
                f"keep_period is {self.keep_period}; checkpoints are written every {self.eval_period} steps (the "
                "evaluation period): give a multiple of that, or 0."
            )
        if not (0 <= self.dropout_rate < 1 and 0 <= self.label_smoothing < 1):
            raise UserError("dropout_rate and label_smoothing lie in [0, 1).")
        if not (0 <= self.l2sp < math.inf and 0 <= self.kl < math.inf):
            raise UserError(f"l2sp and kl are finite and not negative, not {self.l2sp} and {self.kl}.")
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"The alphas between two models lie in [0, 1], not {self.alphas}.")


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


def make_step(
    model: Model, transform: optax.GradientTransformation, training: Training, shardings: Any
) -> Callable[[Tree, Tree, Tree, Array], tuple[Tree, Tree]]:
    """Builds the jitted update `(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

    Only the trained leaves are differentiated: frozen ones come in as constants of the step. So does what `l2sp` and
    `kl` hold the model against, as a room "start" of `frozen`: the trained leaves of the model, before any update.
    """

    def loss(trained: Tree, frozen: Tree, batch: Tree, key: Array) -> Array:
        constants = {room: tree for room, tree in frozen.items() if room != "start"}
        params = trees.merge(trained, constants)
        weights = lora.attach(params["model"], params.get("lora"), training.lora)
        table = prompts.table(params.get("prompt"))
        hidden = model.hidden(weights, table, batch, key if training.dropout_rate else None)
        total = chunked_cross_entropy(
            model, weights, hidden, batch["targets"], batch["weights"], training.label_smoothing
        )
        if training.kl:
            base = trees.merge(constants.get("model", {}), frozen["start"])
            base_hidden = model.hidden(base, None, batch)
            total += training.kl * chunked_divergence(model, weights, hidden, base, base_hidden, batch["weights"])
        return total

    def distance(trained: Tree, start: Tree) -> Array:
        leaves = trees.flatten(trained.get("model", {}))
        squares = (jnp.sum(jnp.square(leaves[path] - leaf)) for path, leaf in trees.flatten(start).items())
        return sum(squares, start=jnp.float32(0))

    def gradients(trained: Tree, frozen: Tree, batch: Tree, key: Array) -> tuple[Array, Tree]:
        if training.microbatches == 1:
            return jax.value_and_grad(loss)(trained, frozen, batch, key)
        # Every microbatch takes rows from all devices: [parts, rows, ...].
        parts = jax.tree.map(lambda x: x.reshape(-1, training.microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, training.microbatches)

        def add(total: tuple[Array, Tree], part: tuple[Tree, Array]) -> tuple[tuple[Array, Tree], None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, frozen, *part)), None

        zero = (jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained))
        return jax.lax.scan(add, zero, (parts, keys))[0]

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: Tree, frozen: Tree, batch: Tree, key: Array) -> tuple[Tree, Tree]:
        key = jax.random.fold_in(key, state["step"])
        total, grads = gradients(state["params"], frozen, batch, key)
        # A mean over real target tokens of the whole batch: AdamW, clipping and penalties see the same scale always.
        tokens = jnp.maximum(batch["weights"].sum(), 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        value = total / tokens
        if training.l2sp:
            away, pull = jax.value_and_grad(distance)(state["params"], frozen["start"])
            value += training.l2sp / 2 * away
            grads = jax.tree.map(lambda g, towards: g + training.l2sp / 2 * towards, grads, pull)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings["params"])
        masks = freezing.layer_masks(state["params"], training.freeze)
        grads = freezing.apply(masks, grads)
        updates, optimizer = transform.update(grads, state["optimizer"], state["params"])
        updates = freezing.apply(masks, updates)  # weight decay knows of no mask
        params = optim.apply_updates(state["params"], updates, jax.random.fold_in(key, _ROUNDING))
        params = freezing.apply(masks, params, state["params"])
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "tokens": tokens}
        metrics["update_norm"] = optax.tree.norm(updates)
        return {"params": params, "optimizer": optimizer, "step": state["step"] + 1}, metrics

    return step


def held(trained: Tree, training: Training) -> Tree:
    """Trained parameters as they are held between updates: the model's in `Training.weight_dtype`.

    A stack that is frozen in part stays as it is: rounded, its frozen layers would not be bitwise what they were.
    """
    if "model" not in trained:
        return trained
    flat = trees.flatten(trained)
    cast = trees.flatten(trained | {"model": cast_weights(trained["model"], training.weight_dtype)})
    return trees.unflatten(cast | {path: flat[path] for path in freezing.layer_masks(trained, training.freeze)})


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
    if "lora" in params and training.lora is None:
        raise UserError(f"Stage {stage.name} has LoRA attached, but not its shape: set Training.lora = @Lora().")
    if stage.prompt and training.kl:
        raise UserError(f"Stage {stage.name} has a prompt, which the base model of kl would not know; set kl = 0.")
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
    constants = frozen | ({"start": trained.get("model", {})} if training.l2sp or training.kl else {})

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
    step_fn = make_step(model, transform, training, shardings)
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
