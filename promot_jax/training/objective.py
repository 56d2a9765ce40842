"""The loss of a stage: the losses of a batch that its objective combines (`methods.base.BatchLosses`), its penalty."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.methods.base import Stage
from promot_jax.models import Model
from promot_jax.params import lora, soft_prompts
from promot_jax.training.losses import chunked_cross_entropy, chunked_divergence, chunked_per_token
from promot_jax.training.settings import Training

Array = jax.Array
Tree = trees.Tree
START = "start"  # subtree of the step's constants: the model's trained leaves at the stage's start


@dataclasses.dataclass(frozen=True)
class Losses:
    """`BatchLosses` of one forward pass."""

    model: Model
    params: Tree  # of the model, LoRA attached
    hidden: Array  # [batch, targets, embed]
    batch: Tree  # `targets` and `weights` [batch, targets], and what `Model.hidden` takes
    label_smoothing: float  # of the cross-entropy
    start: Tree | None  # parameters of the model at the stage's start, where the objective uses them
    table: Array | None  # soft prompts, which the stage does not train where the objective uses `start`

    @property
    def weights(self) -> Array:
        """1 at target tokens and 0 at padding, `[batch, targets]`."""
        return self.batch["weights"]

    def cross_entropy(self, token_weights: Array | None = None) -> Array:
        """Sum over target tokens of the cross-entropy, each times its weight `[batch, targets]`."""
        weights = self.weights if token_weights is None else self.weights * token_weights
        return chunked_cross_entropy(
            self.model, self.params, self.hidden, self.batch["targets"], weights, self.label_smoothing
        )

    def divergence(self) -> Array:
        """Sum over target tokens of KL(start || trained) of the next token."""
        return chunked_divergence(
            self.model, self.params, self.hidden, self.start, self._hidden_at_start(), self.weights
        )

    def per_token(self, measure: Callable[[Array, Array], Array], *, at_start: bool = False) -> Array:
        """`measure(log_probs, targets)` of every target token, `[batch, targets]`, without a gradient."""
        params, hidden = (self.start, self._hidden_at_start()) if at_start else (self.params, self.hidden)
        hidden = jax.lax.stop_gradient(hidden)
        return chunked_per_token(self.model, params, hidden, self.batch["targets"], measure)

    def mean_of_example(self, values: Array) -> Array:
        """At every target token the mean of `values` over the target tokens of its example; both `[batch, targets]`."""
        segments = self.model.target_segments(self.batch)
        same = (segments[:, :, None] == segments[:, None, :]) * self.weights[:, None, :]
        return jnp.einsum("bij,bj->bi", same, values) / jnp.maximum(same.sum(axis=-1), 1.0)

    def _hidden_at_start(self) -> Array:
        assert self.start is not None  # `Objective.uses_start`
        return self.model.hidden(self.start, self.table, self.batch)


def batch_loss(model: Model, stage: Stage, training: Training) -> Callable[[Tree, Tree, Tree, Array], Array]:
    """Returns `(trained, constants, batch, key) -> loss`, a sum over the batch's target tokens.

    `trained` and `constants` are parameter subtrees; constants hold `START` too where the stage uses it.
    """

    def loss(trained: Tree, constants: Tree, batch: Tree, key: Array) -> Array:
        frozen = {name: tree for name, tree in constants.items() if name != START}
        params = trees.merge(trained, frozen)
        weights = lora.attach(params["model"], params.get("lora"), stage.lora)
        table = soft_prompts.table(params.get("prompt"))
        hidden = model.hidden(weights, table, batch, key if training.dropout_rate else None)
        start: Any = trees.merge(frozen.get("model", {}), constants[START]) if stage.objective.uses_start else None
        return stage.objective(Losses(model, weights, hidden, batch, training.label_smoothing, start, table))

    return loss


def penalty_gradient(stage: Stage) -> Callable[[Tree, Tree], tuple[Array, Tree]] | None:
    """Returns `(trained, start) -> (penalty, gradient by trained)`, None for a stage without a penalty."""
    if (penalty := stage.penalty) is None:
        return None
    return jax.value_and_grad(lambda trained, start: penalty(trained.get("model", {}), start))
