"""The timed work of this package, each function for a process of its own; it returns measures.

Modules of the package are imported in the functions: a process imports what its work needs.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import Peak
from benchmarks.steps import FIRST_PROMPT_ID, WARM_UP, drawn_rows

Measures = dict[str, float]


class _Enough(Exception):  # noqa: N818 - no error: leaves the training loop before it writes a checkpoint
    pass


def train_step(
    folder: str,
    stage: str,
    rows: int,
    prompt: int,
    inputs: int,
    targets: int,
    steps: int,
    dtype: str = "float32",
    vocabulary: str = "",
) -> Measures:
    """Median seconds of an update, in the package's own training loop, with AdamW and clipping.

    Args:
        folder: of the model.
        stage: "stage1", "stage2" or "finetune".
        rows: of the batch, each full.
        prompt: rows of the soft prompt, 0 for none.
        inputs: tokens per row, without the prompt.
        targets: tokens per row.
        steps: measured updates.
        dtype: of products.
        vocabulary: tokenizer, for a folder without one.
    """
    from promot_jax.checkpoints import pretrained
    from promot_jax.distributed.partitioning import Partitioner

    base = pretrained.load(folder, Partitioner(), vocabulary=vocabulary, dtype=dtype)
    return timed_updates(base, stage, prompt, random_batches(base, rows, prompt, inputs, targets), rows, steps)


def random_batches(base: Any, rows: int, prompt: int, inputs: int, targets: int) -> Iterator[Any]:
    """Yields the batches of `steps.drawn_rows` for a model (`base.model`), each row with a soft prompt prepended."""
    from promot_jax.models.batch_layout import Tokens

    size = base.model.config.vocab_size
    virtual = list(range(size, size + prompt))
    for ids, answers in drawn_rows(size, rows, inputs, targets):
        filled = [[Tokens([*virtual, *a.tolist()], b.tolist())] for a, b in zip(ids, answers, strict=True)]
        yield base.model.layout(filled, prompt + inputs, targets)


def timed_updates(base: Any, stage: str, prompt: int, batches: Iterator[Any], rows: int, steps: int) -> Measures:
    """Runs the training loop on a model (`base.model`, `base.params`) until `steps` updates after the warm-up."""
    from promot_jax.distributed.partitioning import Partitioner
    from promot_jax.methods.finetune import FINETUNE
    from promot_jax.methods.promot import STAGE1, STAGE2
    from promot_jax.training.loop import train
    from promot_jax.training.optimizer import Optimizer
    from promot_jax.training.settings import Training

    ids = np.arange(FIRST_PROMPT_ID, FIRST_PROMPT_ID + prompt)
    params = {"model": base.params}
    if prompt:
        params |= Partitioner().place({"prompt": {"task": base.model.input_rows(base.params, ids)}})
    marks: list[float] = []
    losses: list[float] = []
    peak = Peak()
    memory: Measures = {}

    def write(step: int, scalars: dict[str, float]) -> None:
        if "train/loss" in scalars:
            marks.append(time.perf_counter())
            losses.append(scalars["train/loss"])
            print(f"step {step}: loss {losses[-1]:.5f}", flush=True)
        if len(marks) == WARM_UP + steps:
            memory.update(peak.measures())
            raise _Enough

    training = Training(
        steps=10**6,
        batch_size=rows,
        eval_period=10**6,
        optimizer=Optimizer("adamw", learning_rate=1e-4, clip_norm=1.0),
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            train(
                Path(scratch),
                base.model,
                params,
                {one.name: one for one in (STAGE1, STAGE2, FINETUNE)}[stage],
                training,
                batches,
                lambda params, step: {"target": 0.0},
                partitioner=Partitioner(),
                seed=0,
                write=write,
            )
    except _Enough:
        pass
    seconds = np.diff(marks)[WARM_UP - 1 :]
    return {"seconds": float(np.median(seconds)), "first_loss": losses[0], **memory}


def load(path: str, files: list[str], vocabulary: str = "", gin_model: str = "") -> Measures:
    """Seconds to load a checkpoint, placed on the device and with its tokenizer; `files` are what it reads."""
    import jax

    from promot_jax.checkpoints import pretrained
    from promot_jax.distributed.partitioning import Partitioner

    config = model_config(gin_model) if gin_model else None
    peak, began = Peak(), time.perf_counter()
    base = pretrained.load(path, Partitioner(), config=config, vocabulary=vocabulary)
    jax.block_until_ready(base.params)
    return loaded(time.perf_counter() - began, files) | peak.measures()


def loaded(seconds: float, files: list[str]) -> Measures:
    """Seconds, and seconds per GB of the files."""
    size = sum(Path(file).stat().st_size for file in files)
    return {"seconds": seconds, "seconds_per_gb": seconds / size * 1e9}


def model_config(gin_file: str) -> Any:
    """The config of a gin file of `gin/models/`."""
    from promot_jax import main
    from promot_jax.config import binding, gin_files

    paths = [gin_files.folder() / name for name in ("infer.gin", gin_file)]
    return binding.bind(main.CONFIGURABLES, paths, []).keywords["experiment"].model


def generate(folder: str, prompts: str, max_tokens: int, beams: int, dtype: str = "float32") -> Measures:
    """Seconds for the outputs of the prompts of a file, by `Sampler`; everything is compiled before.

    Args:
        folder: of the model.
        prompts: a file of `benchmarks.prompts`.
        max_tokens: longest output.
        beams: width of the search; 1 is greedy.
        dtype: of products.
    """
    from benchmarks.prompts import read
    from promot_jax.checkpoints import pretrained
    from promot_jax.decoding.settings import Decoding
    from promot_jax.distributed.partitioning import Partitioner
    from promot_jax.evaluation.sampler import Request, Sampler
    from promot_jax.evaluation.settings import Evaluation

    base = pretrained.load(folder, Partitioner(), dtype=dtype)
    settings = Evaluation(decoding=Decoding(max_tokens=max_tokens, beams=beams))
    sampler = Sampler(base, settings, Partitioner())
    requests = [Request(row["text"]) for row in read(prompts)]
    peak, params = Peak(), {"model": base.params}
    sampler.ask(params, requests)
    began = time.perf_counter()
    outputs = sampler.ask(params, requests)
    seconds = time.perf_counter() - began
    tokens = sum(len(base.vocabulary.encode(output)) for output in outputs)
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "tokens": tokens, **peak.measures()}
