"""FLOW (arXiv 2502.02797): examples on which the base model's loss is high count less, by weights that stay.

An example's weight is `exp(-loss / temperature)`. Its loss is the mean over its target tokens under the model at the
stage's start, and the temperature is the median of these losses over training examples, taken once, before training.
In ProMoT's second stage the losses are those with the soft prompt prepended.

The paper takes the median over all training examples; here it is over the first FLOW_EXAMPLES of each task. An
example's weight multiplies its tokens, which count the same across examples.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=flow, or promot_flow. Macro: FLOW_EXAMPLES.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.errors import UserError
from promot_jax.methods.base import BatchLosses, Method, Objective, Stage, log_prob
from promot_jax.methods.promot import with_objective


@dataclasses.dataclass(frozen=True)
class EasyExamples(Objective):
    """Cross-entropy, each example weighted by its loss under the model at the start."""

    uses_start = True
    flow_examples: int = 1000  # training examples of each task that the temperature is the median of
    temperature: float | None = None  # in nats; None until `calibrated`

    @property
    def calibration_examples(self) -> int:
        """Training examples of each task whose losses `calibrated` is given."""
        return self.flow_examples

    def calibrated(self, losses: Sequence[float]) -> "EasyExamples":
        """With the median loss as temperature."""
        return dataclasses.replace(self, temperature=max(float(np.median(losses)), 1e-6))

    def __call__(self, losses: BatchLosses) -> jax.Array:
        """Sum over target tokens."""
        assert self.temperature is not None  # a stage is calibrated before it trains
        of_example = losses.mean_of_example(-losses.per_token(log_prob, at_start=True))
        return losses.cross_entropy(jnp.exp(-of_example / self.temperature))


@dataclasses.dataclass(frozen=True)
class Flow(Method):
    """One stage: the model, with weighted examples."""

    name = "flow"
    label = "FLOW"
    flow_examples: int = 1000  # training examples of each task that the temperature is the median of

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("flow", trains=("model",), objective=EasyExamples(self.flow_examples)),)

    def check(self) -> None:
        """Raises UserError for a number of examples that has no median."""
        if self.flow_examples < 1:
            raise UserError(f"flow_examples is {self.flow_examples}, but has to be at least 1: set FLOW_EXAMPLES.")


@dataclasses.dataclass(frozen=True)
class PromotFlow(Flow):
    """ProMoT, with weighted examples in stage 2: weighted by their loss given the soft prompt."""

    name = "promot_flow"
    label = "ProMoT with FLOW"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The prompt, then the model."""
        return with_objective("stage2_flow", EasyExamples(self.flow_examples))
