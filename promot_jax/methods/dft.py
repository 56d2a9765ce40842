"""DFT (Wu et al., 2025, arXiv 2508.05629): fine-tuning with each token's loss times the probability of its target.

The gradient of the cross-entropy has a factor `1 / p(target)`, which makes a step large where the model finds the
target unlikely. The probability, without a gradient, takes that factor away: such tokens hardly move the weights.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=dft, or promot_dft
"""

import dataclasses

import jax
import jax.numpy as jnp

from promot_jax.methods.base import BatchLosses, Method, Objective, Stage, log_prob
from promot_jax.methods.promot import with_objective


@dataclasses.dataclass(frozen=True)
class TargetProbability(Objective):
    """Cross-entropy, each token weighted by the probability of its target."""

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        return losses.cross_entropy(jnp.exp(losses.per_token(log_prob)))


class Dft(Method):
    """One stage: the model, with weighted tokens."""

    name = "dft"
    label = "DFT"
    stages = (Stage("dft", trains=("model",), objective=TargetProbability()),)


class PromotDft(Method):
    """ProMoT, with weighted tokens in stage 2."""

    name = "promot_dft"
    label = "ProMoT with DFT"
    stages = with_objective("stage2_dft", TargetProbability())
