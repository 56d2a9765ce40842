"""EAFT (arXiv 2601.02151): fine-tuning with each token's loss times the entropy of the model's prediction.

Where the model is sure and the target says otherwise, learning it overwrites what the model knew. The weight is the
entropy of the 20 most likely tokens, their probabilities scaled to sum to 1, over 3 (about ln 20, its maximum), without
a gradient: tokens that the model is sure of hardly move the weights.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=eaft, or promot_eaft
"""

import dataclasses

import jax
import jax.numpy as jnp

from promot_jax.methods.base import BatchLosses, Method, Objective, Stage
from promot_jax.methods.promot import with_objective

TOP = 20  # tokens whose entropy counts, as in the paper


def top_entropy(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Entropy of the `TOP` most likely tokens over 3, `[...]`, from `[..., vocab]`, whatever the target."""
    top, _ = jax.lax.top_k(log_probs, min(TOP, log_probs.shape[-1]))
    top = jax.nn.log_softmax(top, axis=-1)
    return -jnp.sum(jnp.exp(top) * top, axis=-1) / 3


@dataclasses.dataclass(frozen=True)
class Entropy(Objective):
    """Cross-entropy, each token weighted by the entropy of the prediction."""

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        return losses.cross_entropy(losses.per_token(top_entropy))


class Eaft(Method):
    """One stage: the model, with weighted tokens."""

    name = "eaft"
    label = "EAFT"
    stages = (Stage("eaft", trains=("model",), objective=Entropy()),)


class PromotEaft(Method):
    """ProMoT, with weighted tokens in stage 2."""

    name = "promot_eaft"
    label = "ProMoT with EAFT"
    stages = with_objective("stage2_eaft", Entropy())
