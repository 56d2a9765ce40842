"""The training stream of a stage: packed batches teach what plain ones teach, on every host."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from promot_jax import main
from promot_jax.config import binding, gin_files
from promot_jax.data.packing import PackedBatches
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments import session
from promot_jax.experiments.resume_guard import keep_settings
from promot_jax.experiments.stage import recorded
from promot_jax.experiments.train_stream import stage_batches
from promot_jax.methods.base import Stage
from promot_jax.methods.finetune import FINETUNE
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.state import build, shardings
from promot_jax.training.step import make_step

PLAIN = Training(3, 8, 3, Optimizer("adamw", 1e-2, "constant", warmup_steps=0), pack_batch=False)
PACKED = dataclasses.replace(PLAIN, pack_batch=True)


@pytest.fixture(name="opened", scope="module")
def _opened(tiny_folder: Path) -> session.Session:
    paths = (gin_files.folder() / "finetune.gin", tiny_folder / "tiny.gin")
    job = binding.bind(main.CONFIGURABLES, paths, [])
    return session.open_session(job.keywords["experiment"])


def params_of(opened: session.Session, stage: Stage) -> dict[str, Any]:
    params: dict[str, Any] = {"model": opened.base.params}
    if stage.prompt:
        rows = np.random.default_rng(0).normal(0, 0.3, (4, tiny.EMBED)).astype(np.float32)
        params["prompt"] = {opened.experiment.task: jax.numpy.asarray(rows)}
    return params


def losses(opened: session.Session, stage: Stage, training: Training) -> tuple[list[float], Any]:
    params, model, place = params_of(opened, stage), opened.base.model, opened.experiment.partitioner
    _, stream = stage_batches(opened, params.get("prompt"), model, training, None)
    state, constants, _, transform = build(model, place.place(params), stage, training, place)
    update = make_step(model, transform, stage, training, shardings(state))
    found = []
    for batch in itertools.islice(stream, training.steps):
        state, metrics = update(state, constants, place.batch(batch), jax.random.key(0))
        found.append(float(metrics["loss"]))
    return found, stream


@pytest.mark.parametrize("stage", [STAGE1, FINETUNE], ids=lambda stage: stage.name)
def test_packed_batches_train_as_plain_ones(opened: session.Session, stage: Stage) -> None:
    (packed, stream), (plain, _) = (losses(opened, stage, training) for training in (PACKED, PLAIN))
    assert isinstance(stream, PackedBatches) and stream.shapes[0].rows < 8
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    assert packed == pytest.approx(plain, rel=1e-4) and packed[2] != packed[0]


def test_every_host_packs_all_rows(opened: session.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape depends on all of them."""
    sharded = session.with_experiment(opened, dataclasses.replace(opened.experiment, data_shards=4))
    alone = stage_batches(sharded, None, opened.base.model, PACKED, None)[1]
    monkeypatch.setattr(Partitioner, "held_rows", lambda self, rows: np.arange(rows) < rows // 4)
    plain = stage_batches(sharded, None, opened.base.model, PLAIN, None)[1]
    packed = stage_batches(sharded, None, opened.base.model, PACKED, None)[1]
    assert (list(plain.parts), list(packed.parts)) == ([0], [0, 1, 2, 3])
    for ours, theirs in itertools.islice(zip(packed, alone, strict=True), 4):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_switch_may_change_within_a_run_without_dropout(tmp_path: Path) -> None:
    """And runs from before it go on, with dropout as they began."""
    dropping = [dataclasses.replace(training, dropout_rate=0.1) for training in (PLAIN, PACKED)]
    assert recorded(STAGE2, PLAIN) == recorded(STAGE2, PACKED)
    before = {name: value for name, value in recorded(STAGE2, dropping[0]).items() if name != "pack_batch"}
    keep_settings(tmp_path, {"training": before})
    keep_settings(tmp_path, {"training": recorded(STAGE2, dropping[0])})
    with pytest.raises(UserError, match="was started with training/pack_batch = False, now it is True"):
        keep_settings(tmp_path, {"training": recorded(STAGE2, dropping[1])})
