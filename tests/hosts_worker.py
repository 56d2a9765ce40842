"""What each host of a run does in `test_hosts.py`: arguments are the port, hosts, this host, the mesh and two folders.

Prints a line of JSON. It imports no TensorFlow, so that many of them may start.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax import files, trees
from promot_jax.checkpoints import placement
from promot_jax.checkpoints.orbax import Checkpoints, existing
from promot_jax.distributed import hosts
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import TrainingError, UserError
from promot_jax.params import fingerprint, soft_prompts
from promot_jax.training.optimizer import Optimizer

PROGRESS = {"curve": [], "losses": [0.1, 0.2], "seconds": 1.0}


def parameters(seed: int = 0) -> trees.Tree:
    """Leaves that lie in different ways: split over every axis of the mesh, and replicated."""
    draw = np.random.default_rng(seed)
    shapes = {
        "model/token_embedder/embedding": (16, 8),
        "model/decoder/layers/mlp/wi_0/kernel": (2, 8, 16),
        "model/decoder/decoder_norm/scale": (8,),
        "prompt/task": (4, 8),
    }
    return trees.unflatten({path: draw.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()})


def make_state(partitioner: Partitioner, seed: int) -> trees.Tree:
    """The state of a training on the mesh."""
    params = partitioner.place(parameters(seed))
    transform = Optimizer("adamw").build(10)
    placed = partitioner.like(jax.eval_shape(transform.init, params), params)
    slots = jax.jit(transform.init, out_shardings=placed)(params)
    return {"params": params, "optimizer": slots, "step": jax.device_put(jnp.int32(3), partitioner.replicated())}


def attempt(function: Any) -> str:
    """The message of the error that a call raises."""
    try:
        function()
    except (UserError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refuse() -> None:
    raise UserError(f"host {hosts.index()} refuses")


def main() -> None:
    port, count, index = map(int, sys.argv[1:4])
    mesh, source, target = json.loads(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6])
    hosts.join(f"127.0.0.1:{port}", count, index, start_timeout=60, barrier_timeout=30)
    partitioner = Partitioner(**mesh)

    # ---- arrays ----
    state = make_state(partitioner, seed=0)
    batch = {"tokens": np.arange(16 * 3, dtype=np.int32).reshape(16, 3)}
    held = partitioner.held_rows(16)
    batch["tokens"][~held] = -1  # nobody looks at the rows of others
    tokens = partitioner.batch(batch)["tokens"]
    said: dict[str, Any] = {
        "host": hosts.index(),
        "count": hosts.count(),
        "devices": jax.device_count(),
        "held": np.flatnonzero(held).tolist(),
        "tokens": hosts.whole(tokens).tolist(),
        "fingerprint": fingerprint.fingerprint(state["params"]),
        "pieces": _fingerprint_in_pieces(state["params"]),
    }

    read: set[tuple[int, int]] = set()
    said["leaf"] = list(hosts.whole(_stream(partitioner, read)).shape)
    said["read"] = sorted(read)

    # ---- decisions ----
    said["gathered"] = hosts.gather([index], "a value")
    said["decided"] = hosts.decide(hosts.index, "who decides")
    said["refused"] = attempt(lambda: hosts.decide(refuse, "a refusal"))
    own = target / f"host_{index}"
    own.mkdir(parents=True)
    said["shared"] = [attempt(lambda: hosts.check_shared(target))]
    hosts._VISIBLE = 1.0
    said["shared"].append(attempt(lambda: hosts.check_shared(own)))
    files.write({"host": index}, target / "written.json")
    info = soft_prompts.PromptInfo("task", 4, 1, 50.0, "uniform", "base")
    soft_prompts.save(target / "prompt", state["params"]["prompt"]["task"], info)

    # ---- checkpoints: one of another mesh in, one of this mesh out ----
    reader = Checkpoints(source)
    said["latest"] = reader.latest()
    restored, said["progress"] = reader.restore(reader.latest(), make_state(partitioner, seed=1))
    said["restored"] = fingerprint.fingerprint(restored["params"])
    said["split"] = sorted({str(leaf.sharding.spec) for leaf in jax.tree.leaves(restored)})
    reader.close()
    writer = Checkpoints(target / "checkpoints")
    writer.save(5, restored, PROGRESS, 50.0)
    writer.wait()
    writer.close()
    said["nothing there"] = existing(target / "other") is None

    # ---- a host that does not come ----
    if hosts.count() > 1:
        hosts._run.barrier_timeout = 1.0
        if index == count - 1:
            time.sleep(4)
            said["late"] = ""
        else:
            said["late"] = attempt(lambda: hosts.barrier("a late point"))
        hosts._run.barrier_timeout = 30.0
        hosts._run.exchanges = 1000
    print(json.dumps(said), flush=True)
    hosts.leave()


def _stream(partitioner: Partitioner, read: set[tuple[int, int]]) -> jax.Array:
    """Loads a stack of two kernels of 8 rows as a reader does; notes which rows of which layer are read."""

    def reader(layer: int) -> placement.Reader:
        def rows(first: int, count: int) -> np.ndarray:
            read.update((layer, row) for row in range(first, first + count))
            return np.zeros((count, 16), np.float32)

        return rows

    path = "decoder/layers/mlp/wi_0/kernel"
    entry = placement.Entry((2, 8, 16), (reader(0), reader(1)), stacked=True)
    return trees.flatten(placement.load({path: entry}, partitioner).params)[path]


def _fingerprint_in_pieces(params: trees.Tree) -> str:
    fingerprint._PIECE = 64
    found = fingerprint.fingerprint(params)
    fingerprint._PIECE = 1 << 26
    return found


if __name__ == "__main__":
    main()
