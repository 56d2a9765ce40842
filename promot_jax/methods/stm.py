"""STM, selective token masking (arXiv 2501.14315): target tokens that the base model finds unlikely are left out.

A token counts if its perplexity under the model at the stage's start is at most `stm_perplexity`; the loss is the mean
over the tokens that count. It was made for long answers: where the base finds every label unlikely, nothing is learnt.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=stm, or promot_stm. Macro: STM_PERPLEXITY.
"""

import dataclasses

import jax
import jax.numpy as jnp

from promot_jax.methods.base import BatchLosses, Method, Objective, Stage, check_weight, log_prob
from promot_jax.methods.promot import with_objective


@dataclasses.dataclass(frozen=True)
class LikelyTokens(Objective):
    """Cross-entropy of the tokens that the model at the start finds likely."""

    uses_start = True
    stm_perplexity: float = 2.5  # the highest that counts

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over the target tokens that count, scaled to the number of all of them."""
        perplexity = jnp.exp(-losses.per_token(log_prob, at_start=True))
        counts = (perplexity <= self.stm_perplexity).astype(jnp.float32)
        share = jnp.sum(losses.weights * counts) / jnp.maximum(jnp.sum(losses.weights), 1.0)
        return losses.cross_entropy(counts / jnp.where(share > 0, share, 1.0))


@dataclasses.dataclass(frozen=True)
class Stm(Method):
    """One stage: the model, on likely tokens."""

    name = "stm"
    label = "STM"
    stm_perplexity: float = 2.5  # the highest that counts, as in the paper

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("stm", trains=("model",), objective=LikelyTokens(self.stm_perplexity)),)

    def check(self) -> None:
        """Raises UserError for a perplexity that is not positive and finite."""
        check_weight("stm_perplexity", self.stm_perplexity)


@dataclasses.dataclass(frozen=True)
class PromotStm(Stm):
    """ProMoT, on likely tokens in stage 2: likely given the soft prompt."""

    name = "promot_stm"
    label = "ProMoT with STM"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The prompt, then the model."""
        return with_objective("stage2_stm", LikelyTokens(self.stm_perplexity))
