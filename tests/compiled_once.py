"""Training in one process as if in several: the step of equal settings is compiled once."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.training import loop, stage_checkpoints, step


@contextlib.contextmanager
def compiled_once(opened: list[Checkpoints]) -> Iterator[None]:
    """Compiles each step once, as a process that goes on would compile the same; lists the checkpoints opened."""
    compiled: dict[Any, Any] = {}
    make_step = step.make_step

    def cached(model: Any, transform: Any, stage: Any, training: Any, shardings: Any) -> Any:
        key = (model, stage, training, jax.tree.structure(shardings))
        if key not in compiled:
            compiled[key] = make_step(model, transform, stage, training, shardings)
        return compiled[key]

    def remembered(folder: Any, **options: Any) -> Checkpoints:
        opened.append(Checkpoints(folder, **options))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", cached)
        patch.setattr(stage_checkpoints, "Checkpoints", remembered)
        yield
