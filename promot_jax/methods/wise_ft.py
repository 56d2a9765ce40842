"""WiSE-FT (Wortsman et al., 2022, arXiv 2109.01903): the models on the line between the base and the fine-tuned one.

`(1 - alpha) * base + alpha * tuned` is evaluated for every alpha, without further training. The best alpha above 0 by
target score on the validation split is kept, of equals the smallest. In the curve an alpha's `step` is alpha in
percent; reports say `alpha 0.30`.

Expected on the demo: docs/findings/one_setting.md; 10 minutes on 2 CPU cores. Macro: ALPHAS.
"""

import dataclasses
from collections.abc import Mapping

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.methods.base import Method, Stage


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Weights between two models."""

    alphas: tuple[float, ...]  # shares of the tuned model, in [0, 1]

    def points(self) -> Mapping[int, Mapping[str, float]]:
        """`{alpha in percent: {"alpha": alpha}}`, ascending."""
        return {round(100 * alpha): {"alpha": alpha} for alpha in sorted({*self.alphas})}

    def at(self, step: int, base: trees.Tree, tuned: trees.Tree) -> trees.Tree:
        """The weights at `alpha = points()[step]["alpha"]`."""
        alpha = self.points()[step]["alpha"]
        return trees.interpolate(base, tuned, alpha) if alpha else base


@dataclasses.dataclass(frozen=True)
class WiseFt(Method):
    """Two stages: fine-tuning, then the interpolations."""

    name = "wise_ft"
    label = "WiSE-FT"
    # Shares of the tuned model; 0 is the base model, 1 the fine-tuned one.
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Fine-tuning, then no update."""
        return (
            Stage("finetune", trains=("model",)),
            Stage("wise_ft", trains=("model",), candidates=Interpolation(self.alphas)),
        )

    def check(self) -> None:
        """Raises UserError for alphas that are no shares, or that the curve could not tell apart."""
        if not all(0 <= alpha <= 1 for alpha in self.alphas) or not any(self.alphas):
            raise UserError(f"The alphas between two models lie in [0, 1], at least one above 0, not {self.alphas}.")
        if len(Interpolation(self.alphas).points()) < len({*self.alphas}):
            raise UserError(f"The alphas differ by at least 0.01, unlike {self.alphas}.")
