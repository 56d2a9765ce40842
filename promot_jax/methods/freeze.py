"""Partial fine-tuning: the lower layers stay frozen, the upper ones are trained.

`FREEZE` is a number of the lowest layers, of encoder and decoder each, with which the token embedder and T5's position
biases stay too; or patterns over parameter paths: whole leaves, `model/token_embedder/.*`, or layers of a stack,
`model/decoder/layers_[0-5]/.*`. Frozen layers have no gradient, no update and no weight decay.

Expected on the demo: docs/findings/one_setting.md; 5 minutes on 2 CPU cores. Macro: FREEZE.
"""

import dataclasses

from promot_jax.errors import UserError
from promot_jax.methods.base import Method, Stage
from promot_jax.params import freezing


@dataclasses.dataclass(frozen=True)
class Freeze(Method):
    """One stage: the model, in part."""

    name = "freeze"
    label = "frozen layers"
    # Number of the lowest layers, or path patterns; in the place of `Training.freeze`.
    freeze: int | tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model, without what is frozen."""
        patterns = freezing.lower_layers(self.freeze) if isinstance(self.freeze, int) else self.freeze
        return (Stage("freeze", trains=("model",), freeze=patterns),)

    def check(self) -> None:
        """Raises UserError where nothing is frozen."""
        if not self.freeze:
            raise UserError("Method 'freeze' needs a value for 'freeze': set FREEZE.")
