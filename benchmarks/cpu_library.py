"""XLA's two libraries for matrix products on a CPU, YNNPACK (its default) and Eigen, in what this package runs.

A prefill, a decoding step and an update of SmolLM2-135M, float32. `distributed/forward_programs.py` goes by the answer,
which may be another one on another kind of CPU.
Time: 25 minutes on two cores; --quick --pairs 1: 2 minutes.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import models, ours
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import SECONDS, Question, main

FLAGS = {"eigen": "--xla_cpu_experimental_ynn_fusion_type=", "ynnpack": ""}
PREFILL = (32, 128)  # rows, and tokens of each
DECODING = (128, 64, 8)  # rows, tokens of the input and steps


def cases(quick: bool) -> Sequence[Case]:
    """A prefill, a decoding step, and an update of standard fine-tuning."""
    folder = str(models.decoder(quick))
    return [_case(name, folder) for name in ("prefill", "decode", "update")]


def _case(name: str, folder: str) -> Case:
    function = f"benchmarks.cpu_library:{name}"
    sides = tuple(Side(library, function, {"folder": folder, "flags": flags}) for library, flags in FLAGS.items())
    return Case(name, sides, (Ratio(f"{name}_eigen_vs_ynnpack", "seconds", *FLAGS),))


def prefill(folder: str, flags: str) -> ours.Measures:
    """Seconds of a prefill of full rows."""
    os.environ["XLA_FLAGS"] = flags
    import jax
    import jax.numpy as jnp

    from promot_jax.checkpoints import pretrained
    from promot_jax.distributed.partitioning import Partitioner

    base = pretrained.load(folder, Partitioner())
    batch = {"tokens": jnp.ones(PREFILL, jnp.int32), "lengths": jnp.full(PREFILL[0], PREFILL[1])}
    program = jax.jit(lambda params, batch: base.model.prefill(params, None, batch, 0))
    return _second_time(lambda: program(base.params, batch), 1)


def decode(folder: str, flags: str) -> ours.Measures:
    """Seconds of a decoding step of a running batch."""
    os.environ["XLA_FLAGS"] = flags
    import jax
    import jax.numpy as jnp

    from promot_jax.checkpoints import pretrained
    from promot_jax.distributed.partitioning import Partitioner
    from promot_jax.models.stack import apart

    base, (rows, width, steps) = pretrained.load(folder, Partitioner()), DECODING
    params = apart(base.params, Partitioner())

    def run(params: Any, carry: tuple[jax.Array, Any]) -> Any:
        def step(number: int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            logits, state = base.model.step(params, carry[1], carry[0])
            return logits.argmax(axis=-1).astype(jnp.int32), state

        return jax.lax.fori_loop(0, steps, step, carry)

    first, program = (jnp.ones(rows, jnp.int32), base.model.empty(params, rows, width, steps)), jax.jit(run)
    return _second_time(lambda: program(params, first), steps)


def update(folder: str, flags: str) -> ours.Measures:
    """Seconds of an update of standard fine-tuning, 8 rows of 112 + 16 tokens."""
    os.environ["XLA_FLAGS"] = flags
    return ours.train_step(folder, "finetune", rows=8, prompt=0, inputs=112, targets=16, steps=3)


def _second_time(run: Callable[[], object], steps: int) -> ours.Measures:
    import jax

    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    return {"seconds": (time.perf_counter() - began) / steps}


QUESTION = Question("cpu_library", cases, {"seconds": SECONDS})

if __name__ == "__main__":
    main(QUESTION)
