"""L2-SP (Li et al., 2018, arXiv 1802.01483): fine-tuning with a pull towards the weights that it started from.

Adds `l2sp_weight / 2 * ||weights - start||^2` to the loss per target token, before gradients are clipped.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores. Macro: L2SP_WEIGHT.
"""

import dataclasses

import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.methods.base import Method, Stage, check_weight


@dataclasses.dataclass(frozen=True)
class SquaredDistance:
    """Half the squared distance to the start, times a weight."""

    l2sp_weight: float  # of the penalty

    def __call__(self, model: trees.Tree, start: trees.Tree) -> jax.Array:
        """A float32 scalar; leaves that are not trained have no distance."""
        leaves = trees.flatten(model)
        squares = [jnp.sum(jnp.square(leaves[path] - leaf)) for path, leaf in trees.flatten(start).items()]
        return self.l2sp_weight / 2 * sum(squares, start=jnp.float32(0))


@dataclasses.dataclass(frozen=True)
class L2sp(Method):
    """One stage: the model, with the penalty."""

    name = "l2sp"
    label = "L2-SP"
    l2sp_weight: float = 0.01  # of the penalty; 0.01 is our choice

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("l2sp", trains=("model",), penalty=SquaredDistance(self.l2sp_weight)),)

    def check(self) -> None:
        """Raises UserError for a weight that is not positive and finite."""
        check_weight("l2sp_weight", self.l2sp_weight)
