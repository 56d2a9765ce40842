"""TALR, token-adaptive loss reweighting (arXiv 2509.20758): tokens of high loss count less.

A token's weight is `exp(-loss / temperature)`, without a gradient; the temperature is the median loss of the batch's
target tokens, so it follows the training. Microbatches (`Training.microbatches`) have a median each.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=talr, or promot_talr
"""

import dataclasses

import jax
import jax.numpy as jnp

from promot_jax.methods.base import BatchLosses, Method, Objective, Stage, log_prob
from promot_jax.methods.promot import with_objective


@dataclasses.dataclass(frozen=True)
class MedianTemperature(Objective):
    """Cross-entropy, each token weighted by `exp(-loss / median loss)`."""

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        loss = -losses.per_token(log_prob)
        median = jnp.nanmedian(jnp.where(losses.weights > 0, loss, jnp.nan))
        return losses.cross_entropy(jnp.exp(-loss / jnp.maximum(jnp.nan_to_num(median), 1e-6)))


class Talr(Method):
    """One stage: the model, with weighted tokens."""

    name = "talr"
    label = "TALR"
    stages = (Stage("talr", trains=("model",), objective=MedianTemperature()),)


class PromotTalr(Method):
    """ProMoT, with weighted tokens in stage 2."""

    name = "promot_talr"
    label = "ProMoT with TALR"
    stages = with_objective("stage2_talr", MedianTemperature())
