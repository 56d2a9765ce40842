"""Scores of single examples, compact: what paired statistics and bootstraps need of an evaluation.

They are in the order that examples are evaluated in, which depends on the examples' ids only (`data.examples.read`), so
the n-th score of two methods is of the same example. Digests say whether examples and prompts are the same.
"""

from typing import Annotated, TypeAlias

import numpy as np
from msgspec import Meta

from promot_jax.results.records import Record

TARGET = "target"


class ExampleScores(Record, frozen=True, kw_only=True):
    """Scores of one task's examples in one evaluation."""

    metric: str  # its name
    examples: str  # digest of the examples' ids, in order
    prompts: str  # digest of their inputs, exemplars included
    # a digit per example where all score 0 or 100 ("1" is 100), otherwise their scores on [0, 100]
    scores: str | list[Annotated[float, Meta(ge=0, le=100)]] = ""
    # of a metric that is computed from sums over examples (BLEU): these numbers of each example
    statistics: list[list[int | float]] = []

    def __post_init__(self) -> None:
        """Raises ValueError for digits that are no scores, or for scores and statistics at once."""
        if isinstance(self.scores, str) and set(self.scores) - {"0", "1"}:
            raise ValueError(f"scores as text are digits 0 and 1, not {self.scores[:20]!r}")
        if bool(self.scores) == bool(self.statistics):
            raise ValueError("scores of examples are either `scores` or `statistics`, and never empty")

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.scores or self.statistics)

    def values(self) -> np.ndarray | None:
        """Scores on [0, 100], `[examples]`; None for a metric that is computed from sums."""
        if self.statistics:
            return None
        digits = self.scores if not isinstance(self.scores, str) else [100.0 * int(digit) for digit in self.scores]
        return np.asarray(digits, dtype=float)


ByEvaluation: TypeAlias = dict[str, dict[str, ExampleScores]]  # by evaluation (`icl`, `TARGET`) and task


def icl(shots: int | str, draw: int = 0) -> str:
    """Names an ICL evaluation: `icl_1shot`; of a further draw of exemplars `icl_1shot/draw_1`."""
    return f"icl_{shots}shot" + (f"/draw_{draw}" if draw else "")


def is_icl(name: str, shots: int | str) -> bool:
    """Whether `icl` names some draw so."""
    return name.partition("/")[0] == icl(shots)
