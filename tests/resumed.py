"""Runs started in a process of their own, and what two runs left held against each other."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes

ROOT = Path(__file__).parents[1]


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[str]:
    """Starts `python -m promot_jax.main` in a process of its own, with environment variables."""
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with log.open("a") as errors:
        return processes.start(
            [sys.executable, "-m", "promot_jax.main", *command],
            env=environment, stdout=subprocess.PIPE, stderr=errors, cwd=log.parent,
        )  # fmt: skip


def state(checkpoint: Path) -> dict[str, np.ndarray]:
    """Everything a checkpoint holds: parameters, optimizer, step."""
    handler = ocp.PyTreeCheckpointHandler()
    arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(checkpoint / "state").tree
    )
    restored = handler.restore(checkpoint / "state", args=ocp.args.PyTreeRestore(restore_args=arguments))
    handler.close()
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}


def timeless(path: Path) -> Any:
    """A JSON file without the seconds in it, and the commit, which may gain a "-dirty" between two runs."""
    left = {"seconds", "commit"}
    return json.loads(path.read_text(), object_hook=lambda found: {k: found[k] for k in found if k not in left})


def check_same(workdir: Path, reference: Path) -> None:
    """Checks that two runs left the same, bit for bit."""
    for stage in sorted(reference.rglob("checkpoints")):
        other = workdir / stage.relative_to(reference)
        steps = sorted(path.name for path in stage.iterdir())
        assert steps  # the last and the best; a kill may leave more, half deleted
        for step in steps:
            want, found = state(stage / step), state(other / step)
            assert want.keys() == found.keys()
            for path, leaf in want.items():
                assert leaf.tobytes() == found[path].tobytes(), (stage, step, path)
    files = [path for pattern in ("*.npy", "*.jsonl") for path in sorted(reference.rglob(pattern))]
    assert files
    for path in files:
        found = workdir / path.relative_to(reference)
        assert hashlib.sha256(found.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest(), found
    for path in [*reference.rglob("results.json"), *reference.rglob("stage.json")]:
        assert timeless(workdir / path.relative_to(reference)) == timeless(path)
