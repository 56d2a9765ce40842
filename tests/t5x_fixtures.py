"""Fixtures that the tests of T5X checkpoints share; a module imports those that it wants."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from t5x_writer import Arrays, draw, scratch


@pytest.fixture(name="tmp_path")
def in_scratch() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


@pytest.fixture(name="arrays", scope="module")
def drawn() -> Arrays:
    return draw()
