"""Fixtures that the tests of T5X checkpoints share; a module imports those that it wants."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from t5x_writer import Arrays, draw, scratch

from promot_jax import trees
from promot_jax.checkpoints.t5x.load import Checkpoint


@pytest.fixture(name="tmp_path")
def in_scratch() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


@pytest.fixture(name="arrays", scope="module")
def drawn() -> Arrays:
    return draw()


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, int]]:
    """A whole checkpoint: our tree, and how many leaves are loaded, new and unused."""
    checkpoint = Checkpoint(path, shapes)
    return trees.unflatten({leaf: checkpoint.read(leaf) for leaf in shapes}), checkpoint.leaves
