"""What takes the numbers and outputs of a stage, and several of those as one."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from promot_jax.results.scores import Sample


class Writer(Protocol):
    """Takes what a stage reports; only the host that writes has one that does something."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of an update or an evaluation, by name: `train/loss`, `eval/target`."""

    def outputs(self, step: int, samples: Sequence[Sample]) -> None:
        """Outputs of an evaluation: of the same examples at every step."""

    def close(self) -> None:
        """Writes what is not written yet."""


class Writers:
    """A list of writers, which is one."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As of `Writer`."""
        for writer in self._writers:
            writer.scalars(step, values)

    def outputs(self, step: int, samples: Sequence[Sample]) -> None:
        """As of `Writer`."""
        for writer in self._writers:
            writer.outputs(step, samples)

    def close(self) -> None:
        """As of `Writer`."""
        for writer in self._writers:
            writer.close()
