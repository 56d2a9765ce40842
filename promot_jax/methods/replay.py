"""Replay: fine-tuning with a small share of generic text among the examples (Scialom et al., 2022, arXiv 2205.12393).

REPLAY_TASK is any SeqIO task, read as plain text: the first half of a passage is given, the rest predicted. The base
model's own pretraining text is best. The demo's `editorials` are 3,511 sentences that a Python package carries.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores.
Macros: REPLAY_TASK, REPLAY_RATE, REPLAY_TARGETS.
"""

import dataclasses

from promot_jax.data.replay import Replay
from promot_jax.errors import UserError
from promot_jax.methods.base import Method, Stage


@dataclasses.dataclass(frozen=True)
class ReplayTuning(Method):
    """One stage: the model, on examples and passages."""

    name = "replay"
    label = "replay"
    replay: Replay | None = None  # what is replayed; a share of 1 % is the paper's

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return (Stage("replay", trains=("model",), replay=self.replay),)

    def check(self) -> None:
        """Raises UserError where there is nothing to replay."""
        if self.replay is None:
            raise UserError("Method 'replay' needs a value for 'replay': set Tuning.replay to @Replay().")
