"""Damaged folders of finished stages: the model that was there, or one clear error; the base is watched over too."""

import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import jax
import numpy as np
import pytest
import tiny
from t5x_writer import scratch

from promot_jax import trees
from promot_jax.checkpoints import pretrained, stage_folder
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.params.fingerprint import fingerprint
from promot_jax.results.schema import StageRecord

TRAINED = ("decoder/decoder_norm/scale", "decoder/layers/self_attention/query/kernel")


def train(folder: Path, checkpoint: Path, paths: tuple[str, ...] = TRAINED) -> pretrained.Pretrained:
    """A stage that has added one to some of the leaves; what it gives when it is loaded."""
    base = pretrained.load(str(checkpoint), Partitioner())
    flat = trees.flatten(base.params)
    trained = {path: flat[path] + 1 for path in paths}
    checkpoints = Checkpoints(folder / "checkpoints")
    state = {"params": {"model": trees.unflatten(trained)}, "optimizer": {}, "step": jax.numpy.array(3)}
    checkpoints.save(3, state, {}, 50.0)
    checkpoints.close()
    fields: dict[str, Any] = {"stage": "finetune", "trains": "model", "checkpoint": str(checkpoint)}
    stage_folder.record(folder, StageRecord(**fields, base=base.base, best_step=3, curve=[]))
    loaded = pretrained.load(str(folder), Partitioner())
    assert fingerprint(loaded.params) == fingerprint(trees.unflatten(flat | trained)) == loaded.fingerprint
    assert (loaded.base, loaded.path) == (base.base, str(folder))
    return loaded


@pytest.fixture(name="tmp_path")
def _tmp_path() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    tiny.write(tmp_path / "tiny.gguf", tiny.tensors())
    train(tmp_path / "run", tmp_path / "tiny.gguf")
    return tmp_path / "run"


def test_a_stage_on_a_stage(folder: Path) -> None:
    """The first stage's leaves count where the second did not train them; the base of both is the same."""
    first = trees.flatten(pretrained.load(str(folder), Partitioner()).params)
    second = train(folder.parent / "second", folder, (TRAINED[0], "token_embedder/embedding"))
    found = trees.flatten(second.params)
    assert (found[TRAINED[1]] == first[TRAINED[1]]).all() and (found[TRAINED[0]] == first[TRAINED[0]] + 1).all()
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in found.values())


@pytest.mark.parametrize("tensor", ["output_norm.weight", "token_embd.weight"])
def test_a_base_that_changed(folder: Path, tensor: str) -> None:
    """Also in a leaf that the stage trained, and which is not kept."""
    weights = tiny.tensors()
    weights[tensor][0] += 1e-3
    tiny.write(folder.parent / "tiny.gguf", weights)
    with pytest.raises(UserError, match=r"was trained from a base model .* now holds"):
        pretrained.load(str(folder), Partitioner())


def test_stages_that_start_from_one_another(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "other")
    for name, checkpoint in (("run", "run"), ("run", "other"), ("other", "run")):
        file = folder.parent / name / stage_folder.STAGE_FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | {"checkpoint": str(folder.parent / checkpoint)}))
        if (name, checkpoint) != ("run", "other"):
            with pytest.raises(UserError, match="names a checkpoint that was trained from it"):
                pretrained.load(str(folder), Partitioner())


def test_damaged_descriptions(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / stage_folder.STAGE_FILE, tmp_path)
    messages: list[str] = []
    damages = damage.damage(tmp_path, [stage_folder.STAGE_FILE], random.Random(0))
    for i, _ in enumerate(itertools.islice(damages, 2000)):
        with damage.refused(messages, str(i), memory=1 << 20 if i % 10 == 0 else 0):
            found = stage_folder.describe(tmp_path)
            assert found is not None and isinstance(found.checkpoint, str)
    assert 500 < len(messages) < 2000


def known(file: Path) -> tuple[str, int]:
    """What is the same of a file in every run: some have random names."""
    return re.sub(r"[0-9a-f]{16,}", "", str(file)), file.stat().st_size


def test_a_trained_leaf_that_a_damaged_description_leaves_out(folder: Path) -> None:
    """It would be taken from the base model."""
    (described,) = folder.rglob("_METADATA")
    good = described.read_text()
    described.write_text(good.replace('"params"', '"qarams"'))
    with pytest.raises(UserError, match=r"is damaged \(it holds 'qarams'\)"):
        pretrained.load(str(folder), Partitioner())
    described.write_text(good)


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_stages(folder: Path, count: int) -> None:
    want, messages, kept = pretrained.load(str(folder), Partitioner()), [], 0
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    names = [str(file.relative_to(folder)) for file in sorted(files, key=known)]
    assert any("ocdbt" in name for name in names) and any(name.endswith("_METADATA") for name in names)
    before = sorted(folder.parent.rglob("*"))
    damages = damage.damage(folder, [*names, *[stage_folder.STAGE_FILE] * len(names)], random.Random(count))
    for i, name in enumerate(itertools.islice(damages, count)):
        with damage.refused(messages, f"{name}, {i}", seconds=10):
            found = pretrained.load(str(folder), Partitioner())
            kept += 1
            # A digit of `best_step` may name another checkpoint of the stage.
            assert found.fingerprint == want.fingerprint or name == "stage.json", f"{name}, {i}"
            assert all(np.isfinite(leaf).all() for leaf in trees.flatten(found.params).values())
    assert sorted(folder.parent.rglob("*")) == before
    assert 0 < kept < count and len(messages) == count - kept


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 10**9, "alpha": 8.0, "targets": ["model/.*"]},
        {"rank": "4"},
        {"rank": 0},
        {"targets": 3},
        {"alpha": None},
    ],
)
def test_a_wild_lora_in_a_description_is_one_sentence(folder: Path, lora: dict[str, object]) -> None:
    """The right shape is that of the checkpoint; a rank of a thousand millions must not be allocated."""
    good = (folder / stage_folder.STAGE_FILE).read_text()
    shape = {"rank": 2, "alpha": 4.0, "targets": ["model/.*attention/(query|value)/kernel"]}
    try:
        (folder / stage_folder.STAGE_FILE).write_text(json.dumps(json.loads(good) | {"lora": shape | lora}))
        with pytest.raises(UserError, match=r"stage.json|LoRA|holds lora/"):
            pretrained.load(str(folder), Partitioner())
    finally:
        (folder / stage_folder.STAGE_FILE).write_text(good)
