"""A SeqIO registry that forgets what a test registered."""

from collections.abc import Iterator

import pytest
import seqio


@pytest.fixture
def registry() -> Iterator[None]:
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)
