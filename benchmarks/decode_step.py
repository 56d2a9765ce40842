"""Time of a decoding step of a model with the sizes of SmolLM2-135M and random weights.

    python benchmarks/decode_step.py [--rows=32] [--width=384] [--steps=64]

Prints seconds per step, wall-clock and CPU time, with the layers apart (as evaluations decode on a CPU) and stacked (as
on other devices), and the bytes that a step has to read: each weight once, and the cache.
"""

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.decoding import continuous_batching as batching
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import DecoderConfig, build
from promot_jax.models.stack import apart

CONFIG = DecoderConfig(49152, 576, num_heads=9, num_kv_heads=3, num_layers=30, head_dim=64, mlp_dim=1536)


def measured(model: Any, params: Any, rows: int, width: int, steps: int) -> tuple[float, float, int]:
    """Returns wall-clock and CPU seconds per step, and the bytes of weights and cache."""
    settings, stops, key = Decoding(max_tokens=steps), np.zeros(CONFIG.vocab_size, bool), jax.random.key(0)
    generated, state = batching._empty(model, settings, params, rows, width, steps)
    limits = jnp.full(rows, 1 << 20, jnp.int32)
    generated = generated._replace(done=jnp.zeros(rows, bool), limits=limits)  # nobody ends
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state["cache"])))
    for _ in range(2):  # the first time compiles
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        generated, state = jax.block_until_ready(
            batching._decode(model, settings, params, stops, key, rows, generated, state)
        )
        after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (time.monotonic() - started) / batching.STEPS, used / batching.STEPS, size


def main() -> None:
    """Prints a line for each layout of the layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 32), ("width", 384), ("steps", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    partitioner = Partitioner()
    model = build(CONFIG, partitioner)
    params = jax.jit(model.init)(jax.random.key(0))
    for name, layers in (("apart", apart(params, partitioner)), ("stacked", params)):
        wall, used, size = measured(model, layers, **sizes)
        print(f"{name}: {wall:.3f} s per step, {used:.3f} s of CPU time; at least {size / 1e6:.0f} MB are read")


if __name__ == "__main__":
    main()
