"""What all tests share: CPU only, no network, TensorFlow silent, one random state per test."""

import os

# Before jax, TensorFlow or transformers is imported. Tests that need several devices start a process of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("PROMOT_COMPILATION_CACHE", "off")  # tests neither read nor fill the user's

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import compilation
import numpy as np
import processes
import pytest
from hypothesis import settings

# Before jax too, and for the processes that pytest-xdist and the tests start.
os.environ.update(compilation.environment())

# A suite that was started in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no deadline: the machine may be busy, and the first call of a function is slow.
settings.register_profile("promot_jax", derandomize=True, deadline=None)
settings.load_profile("promot_jax")


# Files that take long. They go first: `--dist loadfile` would leave a worker alone with the last one.
LONGEST = (
    "distributed/test_partitioning.py",
    "models/test_real_model.py",
    "methods/test_methods.py",
    "jobs/test_jobs.py",
    "jobs/test_precompile.py",
    "experiments/test_resume.py",
    "sweep/test_scheduler.py",
    "training/test_loop.py",
    "test_launch.py",
    "distributed/test_hosts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test draws the same numbers whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    processes.end_all()


@pytest.fixture
def registry() -> Iterator[None]:
    """SeqIO's registries forget what a test registered, but not the package's own tasks."""
    from promot_jax.data import examples

    # isort: split
    import seqio

    examples.import_built_in()
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


@pytest.fixture(scope="module")
def compiled_for_speed() -> Iterator[None]:
    """For real models, where running takes longer than compiling."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For models so small that several threads wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its gin file (`tests/tiny.py`)."""
    import tiny

    return tiny.workspace(tmp_path_factory.mktemp("tiny"))
