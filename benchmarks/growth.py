"""The points of `cost_growth`, each for a process of its own: random Llama shapes, a training step or an evaluation.

Beside what is measured a point says what is expected: `expected_flops`, to which time should be proportional, and
`expected_bytes`, what the weights, the optimizer and the activations take, to which the process itself is added.
"""

import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.memory import Peak
from benchmarks.ours import random_batches, timed_updates

Measures = dict[str, float]
FLOAT = 4  # bytes
BYTES = 384  # vocabulary of ByT5's bytes


def train_step(
    stage: str,
    rows: int,
    prompt: int,
    inputs: int,
    targets: int,
    steps: int,
    layers: int,
    emb_dim: int,
    vocab_size: int = 8192,
) -> Measures:
    """A step of `stage` (see `ours.train_step`) of a random model."""
    base = _random_model(layers, emb_dim, vocab_size)
    measures = timed_updates(base, stage, prompt, random_batches(base, rows, prompt, inputs, targets), rows, steps)
    return measures | _expected_step(base, stage, rows, prompt + inputs, targets)


def evaluate(shots: int, tasks: int, examples: int, layers: int, emb_dim: int, max_tokens: int = 16) -> Measures:
    """Seconds to generate for `tasks * examples` prompts of `shots` exemplars of 40 bytes, programs compiled before."""
    from promot_jax.checkpoints.pretrained import Pretrained
    from promot_jax.data.vocabularies.load import load
    from promot_jax.decoding.settings import Decoding
    from promot_jax.distributed.partitioning import Partitioner
    from promot_jax.evaluation.sampler import Request, Sampler
    from promot_jax.evaluation.settings import Evaluation
    from promot_jax.precompile import roofline

    model = _random_model(layers, emb_dim, BYTES)
    base = Pretrained(model.model, model.params, load("bytes"), "", "", "", {})
    # Without a text to stop at, a random model goes on to the limit: the work is known.
    settings = Evaluation(decoding=Decoding(max_tokens=max_tokens, stop=""))
    sampler = Sampler(base, settings, Partitioner())
    length = 40 * (shots + 1)
    rng = np.random.default_rng(0)
    requests = [Request(bytes(rng.integers(97, 123, length)).decode()) for _ in range(tasks * examples)]
    params, peak = {"model": base.params}, Peak()
    sampler.ask(params, requests)
    began = time.perf_counter()
    sampler.ask(params, requests)
    seconds = time.perf_counter() - began
    config, rows = model.model.config, settings.tokens_per_batch // length
    cache = 2 * config.num_layers * rows * (length + max_tokens) * config.num_kv_heads * config.head_dim
    expected: Measures = {
        "expected_flops": roofline.decoding_flops(config, tasks * examples, length, max_tokens, 1),
        "expected_bytes": FLOAT * (_size(base) + cache),
    }
    return {"seconds": seconds, **peak.measures(), **expected}


def bound(topology: str) -> Measures:
    """The least seconds of a step of stage 2 of SmolLM2-135M on a TPU slice, 8 rows per chip, from `precompile.gin`."""
    with tempfile.TemporaryDirectory() as workdir:
        models.job(
            Path(workdir),
            "precompile.gin",
            ("models/smollm2_135m.gin", "meshes/data.gin"),
            TOPOLOGY=topology,
            PROGRAMS=("stage2",),
            ROWS_PER_CHIP=8,
        )
        (entry,) = json.loads((Path(workdir) / "precompile.json").read_text("utf-8")).values()
    return {
        "seconds": entry["step_seconds"],
        "peak_bytes": entry["memory"]["total"],
        "expected_flops": 1.0,  # each chip has the same rows: the time should stay
        "expected_bytes": 0.0,
    }


def _random_model(layers: int, emb_dim: int, vocab_size: int) -> Any:
    """A model and its parameters; heads of 64, two queries per key, an MLP of four times the width."""
    import jax

    from promot_jax.distributed.partitioning import Partitioner
    from promot_jax.models import DecoderConfig, build

    heads = emb_dim // 64
    config = DecoderConfig(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        num_kv_heads=heads // 2,
        num_layers=layers,
        head_dim=64,
        mlp_dim=4 * emb_dim,
    )
    model = build(config, Partitioner())
    params = Partitioner().place({"model": jax.jit(model.init)(jax.random.key(0))})["model"]
    return SimpleNamespace(model=model, params=params)


def _size(base: Any) -> int:
    from promot_jax import trees

    return trees.count(base.params)


def _expected_step(base: Any, stage: str, rows: int, inputs: int, targets: int) -> Measures:
    """FLOPs of the forward pass, and bytes: of the weights, and of what the backward pass needs of the forward pass."""
    from promot_jax.precompile import roofline

    config = base.model.config
    length, width = inputs + targets, config.num_heads * config.head_dim
    # Per token of a layer: the stream and its norms, queries, keys, values, their mixture, the MLP, attention's shares.
    token = 5 * config.emb_dim + 2 * width + 2 * config.num_kv_heads * config.head_dim + 3 * config.mlp_dim
    token += config.num_heads * length
    logits = 2 * rows * targets * config.vocab_size
    trained = 0 if stage == "stage1" else 4  # copies: the trained weights, two moments, the gradient
    return {
        "expected_flops": roofline.forward_flops(config, rows, inputs, targets, targets),
        "expected_bytes": FLOAT * (_size(base) * (1 + trained) + rows * length * config.num_layers * token + logits),
    }
