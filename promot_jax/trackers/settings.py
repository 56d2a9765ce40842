"""Which tracker a run reports to, beside TensorBoard."""

import dataclasses
import importlib.util

from promot_jax.errors import UserError, nearest

SERVICES = {"wandb": "Weights & Biases", "trackio": "Trackio"}  # packages, and what they are called


@dataclasses.dataclass(frozen=True)
class Tracker:
    """A tracker of experiments, in addition to TensorBoard."""

    name: str = ""  # "wandb", "trackio", or "" for none; TRACKER
    project: str = "promot_jax"  # what the tracker files the runs under

    def __post_init__(self) -> None:
        """Raises UserError for a tracker that is not known, or whose package is not installed."""
        if not self.name:
            return
        if self.name not in SERVICES:
            raise UserError(f"TRACKER is {self.name!r}, which is no tracker{nearest(self.name, SERVICES)}.")
        if importlib.util.find_spec(self.name) is None:
            raise UserError(
                f"TRACKER = {self.name!r} needs the package {self.name}, which is not installed: pip install "
                f"'promot_jax[{self.name}]', or leave TRACKER out."
            )
