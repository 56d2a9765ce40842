"""The state of training a stage: what an update changes, and all else that a step needs, built in one place."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promot_jax import trees
from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.methods.base import Stage
from promot_jax.models import Model
from promot_jax.params import freezing
from promot_jax.params.dtypes import cast_weights
from promot_jax.training import optimizer as optim
from promot_jax.training.objective import START
from promot_jax.training.settings import Training

Tree = trees.Tree


@partial(jax.tree_util.register_dataclass, data_fields=["params", "optimizer", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes; a checkpoint holds these three by their names (`vars`)."""

    params: Tree  # the trained leaves, `{"model": ..., "prompt": {task: rows}, "lora": ...}` or part of it
    optimizer: Any  # its state, of the trained leaves alone
    step: Any  # updates done, int32 scalar


def build(
    model: Model, params: Tree, stage: Stage, training: Training, partitioner: Partitioner
) -> tuple[TrainState, Tree, Tree, optax.GradientTransformation]:
    """Builds what training a stage starts from.

    Args:
        model: its dtype is that of the products.
        params: `{"model": ..., "prompt": {task: rows}, "lora": ...}` on the mesh; or `jax.ShapeDtypeStruct`s with
            shardings, of which the state is built as shapes too, and nothing is allocated.
        stage: what is trained.
        training: how.
        partitioner: places the optimizer's state.

    Returns:
        The state, which shares no buffer with `params` and may be donated; the step's argument `frozen`: the frozen
        leaves, and under `START` the model's trained ones where the stage's loss uses them; the frozen leaves that
        complete the trained ones for an evaluation; the optimizer.

    Raises:
        UserError: nothing to train, or a pattern of `freeze` that matches nothing.
    """
    trained, frozen = freezing.split(params, stage.trains, training.freeze)
    if not trained:
        subtrees = " and ".join(map(repr, stage.trains))
        raise UserError(f"Stage {stage.name} trains nothing: every leaf of {subtrees} is frozen.")
    start = {START: trained.get("model", {})} if stage.uses_start else {}
    rest = frozen
    # Half as much to read at every step; XLA for CPUs would make them float32 again, those of all layers at once.
    if "model" not in trained and partitioning.device_of(partitioner).platform != "cpu":
        frozen = leafwise(lambda tree: cast_weights(tree, model.config.dtype), frozen)
        rest = rest if "lora" in params else frozen  # LoRA is merged into float32 kernels
    # A copy: the state is donated, and the caller keeps its own.
    trained = leafwise(lambda tree: jax.tree.map(jnp.copy, in_weight_dtype(tree, training)), trained)
    transform = optim.build(training.steps, training.optimizer, prompt=training.prompt_optimizer)
    places = (partitioner.like(jax.eval_shape(transform.init, trained), trained), partitioner.replicated())
    init = jax.jit(lambda params: (transform.init(params), jnp.int32(0)), out_shardings=places)
    optimizer, step = _made(init, trained, places)
    return TrainState(trained, optimizer, step), frozen | start, rest, transform


def shardings(state: TrainState) -> Any:
    """Where each leaf of a state lies, as a `TrainState`."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def in_weight_dtype(trained: Tree, training: Training) -> Tree:
    """Trained parameters as they are kept between updates: the model's in `Training.weight_dtype`.

    A stack that is frozen in part stays as it is: rounded, its frozen layers would not be bitwise what they were.
    """
    if "model" not in trained:
        return trained
    flat = trees.flatten(trained)
    cast = trees.flatten(trained | {"model": cast_weights(trained["model"], training.weight_dtype)})
    return trees.unflatten(cast | {path: flat[path] for path in freezing.layer_masks(trained, training.freeze)})


def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, with where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def leafwise(change: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """Changes the leaves of a tree, each of which stays where it lies: arrays, or shapes with shardings."""
    return _made(change, tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def _made(make: Callable[[Tree], Any], tree: Tree, shardings: Any) -> Any:
    """What `make` returns for a tree of arrays; for one of shapes, the shapes of that."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(placed, jax.eval_shape(make, tree), shardings)
    return make(tree)
