"""KL to base: fine-tuning with the divergence from the frozen base model's predictions.

Adds `kl_weight * KL(base || tuned)` of the next token, summed over the target tokens, to the cross-entropy. The base
model is evaluated on the same inputs in every step; both are worked through in chunks of target positions, so that the
logits of a large vocabulary never exist as a whole.

Expected on the demo: docs/findings/one_setting.md; 8 minutes on 2 CPU cores. Macro: KL_WEIGHT.
"""

import dataclasses

import jax

from promot_jax.methods.base import BatchLosses, Method, Objective, Stage, check_weight


@dataclasses.dataclass(frozen=True)
class Divergence(Objective):
    """Cross-entropy plus the weighted divergence from the model at the start."""

    uses_start = True
    kl_weight: float = 0.1  # of the divergence

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        return losses.cross_entropy() + self.kl_weight * losses.divergence()


@dataclasses.dataclass(frozen=True)
class Kl(Method):
    """One stage: the model, with the divergence in its loss."""

    name = "kl"
    label = "KL to base"
    kl_weight: float = 0.1  # of the divergence; 0.1 is our choice

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("kl", trains=("model",), objective=Divergence(self.kl_weight)),)

    def check(self) -> None:
        """Raises UserError for a weight that is not positive and finite."""
        check_weight("kl_weight", self.kl_weight)
