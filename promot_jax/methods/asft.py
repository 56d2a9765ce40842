"""ASFT, anchored supervised fine-tuning: DFT with the divergence from the base model's predictions.

Adds `asft_weight * KL(base || tuned)` of the next token to DFT's weighted cross-entropy, so that the tuned model stays
near the base also where DFT's weights are large.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=asft, or promot_asft. Macro: ASFT_WEIGHT.
"""

import dataclasses

import jax

from promot_jax.methods.base import BatchLosses, Method, Stage, check_weight
from promot_jax.methods.dft import TargetProbability
from promot_jax.methods.promot import with_objective


@dataclasses.dataclass(frozen=True)
class Anchored(TargetProbability):
    """DFT's loss plus the weighted divergence from the model at the start."""

    uses_start = True
    asft_weight: float = 0.1  # of the divergence

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        return super().__call__(losses) + self.asft_weight * losses.divergence()


@dataclasses.dataclass(frozen=True)
class Asft(Method):
    """One stage: the model, with weighted tokens and the divergence."""

    name = "asft"
    label = "ASFT"
    asft_weight: float = 0.1  # of the divergence, the usual one

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("asft", trains=("model",), objective=Anchored(self.asft_weight)),)

    def check(self) -> None:
        """Raises UserError for a weight that is not positive and finite."""
        check_weight("asft_weight", self.asft_weight)


@dataclasses.dataclass(frozen=True)
class PromotAsft(Asft):
    """ProMoT, with weighted tokens and the divergence, given the soft prompt, in stage 2."""

    name = "promot_asft"
    label = "ProMoT with ASFT"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The prompt, then the model."""
        return with_objective("stage2_asft", Anchored(self.asft_weight))
