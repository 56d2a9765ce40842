"""The jitted training step: loss, gradients of the trained leaves alone, update."""

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promot_jax import trees
from promot_jax.methods.base import Stage
from promot_jax.models import Model
from promot_jax.params import freezing
from promot_jax.training import blockwise
from promot_jax.training.objective import START, batch_loss, penalty_gradient
from promot_jax.training.optimizer import apply_updates
from promot_jax.training.settings import Training
from promot_jax.training.state import TrainState

Array = jax.Array
Tree = trees.Tree
_ROUNDING = 1  # folded into a step's key, whose other use is dropout


def make_step(
    model: Model, transform: optax.GradientTransformation, stage: Stage, training: Training, shardings: Any
) -> Callable[[TrainState, Tree, Tree, Array], tuple[TrainState, Tree]]:
    """Builds the jitted update `(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

    Only the trained leaves are differentiated: frozen ones come in as constants of the step. So do the model's trained
    leaves at the stage's start where the stage's loss uses them, as the subtree `objective.START` of `frozen`.

    Stages of equal settings, as those of a sweep's seeds, share one step: it is traced and compiled once per process.
    """
    leaves, structure = jax.tree.flatten(shardings)
    return _make_step(model, transform, stage, training, structure, tuple(leaves))


@lru_cache(maxsize=4)  # a compiled step takes memory of the device
def _make_step(
    model: Model,
    transform: optax.GradientTransformation,
    stage: Stage,
    training: Training,
    structure: Any,
    leaves: tuple[Hashable, ...],
) -> Callable[[TrainState, Tree, Tree, Array], tuple[TrainState, Tree]]:
    shardings = jax.tree.unflatten(structure, leaves)
    loss, penalty = batch_loss(model, stage, training), penalty_gradient(stage)

    def gradients(trained: Tree, frozen: Tree, batch: Tree, key: Array, tokens: Array) -> tuple[Array, Tree]:
        # Divided before it is differentiated: dividing the gradients would read and write all of them once more.
        value_and_grad = jax.value_and_grad(lambda *arguments: loss(*arguments) / tokens)
        if training.microbatches == 1:
            return value_and_grad(trained, frozen, batch, key)
        # Every microbatch takes rows from all devices: [parts, rows, ...].
        parts = jax.tree.map(lambda x: x.reshape(-1, training.microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, training.microbatches)

        def add(total: tuple[Array, Tree], part: tuple[Tree, Array]) -> tuple[tuple[Array, Tree], None]:
            return jax.tree.map(jnp.add, total, value_and_grad(trained, frozen, *part)), None

        zero = (jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained))
        return jax.lax.scan(add, zero, (parts, keys))[0]

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: TrainState, frozen: Tree, batch: Tree, key: Array) -> tuple[TrainState, Tree]:
        key = jax.random.fold_in(key, state.step)
        # A mean over real target tokens of the whole batch: AdamW, clipping and penalties see the same scale always.
        tokens = jnp.maximum(batch["weights"].sum(), 1.0)
        value, grads = gradients(state.params, frozen, batch, key, tokens)
        if penalty is not None:
            added, pull = penalty(state.params, frozen[START])
            value += added
            grads = jax.tree.map(jnp.add, grads, pull)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        masks = freezing.layer_masks(state.params, training.freeze)
        grads = freezing.apply(masks, grads)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "tokens": tokens}
        if not masks and blockwise.applies(training, state.params, shardings):
            params, optimizer, metrics["update_norm"] = blockwise.update(
                transform, grads, state.optimizer, state.params, metrics["grad_norm"]
            )
        else:
            updates, optimizer = transform.update(grads, state.optimizer, state.params)
            updates = freezing.apply(masks, updates)  # weight decay knows of no mask
            params = apply_updates(state.params, updates, jax.random.fold_in(key, _ROUNDING))
            params = freezing.apply(masks, params, state.params)
            metrics["update_norm"] = optax.tree.norm(updates)
        return TrainState(params, optimizer, state.step + 1), metrics

    return step
