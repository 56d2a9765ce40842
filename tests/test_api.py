"""The library on the tiny model: what README and `promot_jax.api` show, from rows to an exported folder."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import promot_jax as pj
from promot_jax import trees
from promot_jax.api import _registered
from promot_jax.checkpoints import pretrained
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.params.fingerprint import fingerprint

ROWS = [(f"Review: film {i} was {word}\nLabel:", word) for i in range(12) for word in ("good", "bad")]
TEXTS = ["Review: the cast was bad\nLabel:", "Review: a plot was good\nLabel:"]
OPTIONS = {"steps": 2, "batch_size": 4}


@pytest.fixture(name="task", scope="module")
def _task() -> pj.Task:
    return pj.Task("api_reviews", train=ROWS[:16], validation=ROWS[16:20], test=ROWS[20:], labels=("good", "bad"))


@pytest.fixture(name="models", scope="module")
def _models(tiny_folder: Path, task: pj.Task) -> dict[str, pj.Model]:
    base = pj.load(str(tiny_folder / "tiny.gguf"))
    prompted = base.tune_prompt(task, learning_rate=0.3, length=3, workdir=tiny_folder / "api/stage1", **OPTIONS)
    tuned = prompted.tune_model(task, learning_rate=0.01, workdir=tiny_folder / "api/stage2", **OPTIONS)
    return {"base": base, "prompted": prompted, "tuned": tuned}


def test_stages(models: dict[str, pj.Model], tiny_folder: Path) -> None:
    """Stage 1 moves the prompt alone, stage 2 the model alone; runs and prompts are read back from their folders."""
    base, prompted, tuned = models["base"], models["prompted"], models["tuned"]
    assert prompted.base is base.base and not base.prompts
    assert tuned.base.fingerprint == fingerprint(tuned.base.params) != base.base.fingerprint
    assert tuned.prompts is not prompted.prompts or tuned.prompts == prompted.prompts
    np.testing.assert_array_equal(tuned.prompts["api_reviews"], prompted.prompts["api_reviews"])
    again = pj.load(str(tiny_folder / "api/stage2"), prompt=str(tiny_folder / "api/stage1"))
    assert again.base.fingerprint == tuned.base.fingerprint
    np.testing.assert_array_equal(again.prompts["api_reviews"], tuned.prompts["api_reviews"])
    assert again.generate(TEXTS) == tuned.generate(TEXTS)


def test_a_workdir_that_reads_as_a_pattern_is_refused(
    models: dict[str, pj.Model], task: pj.Task, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"run\[1\] has one of \* \? \[ in its path"):
        models["base"].tune_model(task, learning_rate=0.01, workdir=tmp_path / "run[1]", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_generate_with_and_without_prompt(models: dict[str, pj.Model]) -> None:
    prompted, decoding = models["prompted"], pj.Decoding(max_tokens=6, stop="")
    plain = models["base"].generate(TEXTS, decoding=decoding)
    assert prompted.strip().generate(TEXTS, decoding=decoding) == plain
    assert prompted.generate(TEXTS, prompt="", decoding=decoding) == plain
    assert prompted.generate(TEXTS, decoding=decoding) != plain
    two = dataclasses.replace(prompted, prompts={**prompted.prompts, "b": prompted.prompts["api_reviews"]})
    assert two.generate(TEXTS, prompt="b", decoding=decoding) == prompted.generate(TEXTS, decoding=decoding)
    with pytest.raises(UserError, match="several soft prompts: name one of api_reviews, b"):
        two.generate(TEXTS)


def test_evaluate(models: dict[str, pj.Model], task: pj.Task) -> None:
    """Without a prompt of the task's name the score is that of the plain model; shots change the inputs."""
    base, prompted = models["base"], models["prompted"]
    score = base.evaluate(task)
    assert (score.metric, score.n, score.shots) == ("accuracy", 4, 0) and score.ci95 is not None
    assert prompted.strip().evaluate(task.name) == score
    assert base.evaluate(task, "validation", shots=2, limit=3).n == 3


def test_export(models: dict[str, pj.Model], tmp_path: Path) -> None:
    tuned = models["tuned"]
    folders = tuned.export(tmp_path / "out")
    assert [folder.name for folder in folders] == ["stripped", "with_prompts", "peft"]
    assert pretrained.load(str(folders[0]), Partitioner()).fingerprint == tuned.base.fingerprint
    assert "Base model: " in (folders[0] / "README.md").read_text()
    assert [folder.name for folder in tuned.strip().export(tmp_path / "plain")] == ["stripped"]


@pytest.mark.usefixtures("registry")
def test_tasks() -> None:
    """Pairs and mappings; a tenth of the rows for each split that is not given; a name stands for one task."""
    from promot_jax.data import examples

    rows = [{"text": f"film {i}", "label": "good"} for i in range(100)]
    task = pj.Task("api_held_out", rows, inputs="{text}. Good or bad?", targets="{label}")
    assert task.register() == dataclasses.replace(task).register() == "api_held_out"
    read = {split: examples.read("api_held_out", split) for split in ("train", "validation", "test")}
    assert read["train"][0].inputs.endswith(". Good or bad?") and read["train"][0].targets == "good"
    sizes = {split: len(found) for split, found in read.items()}
    assert sum(sizes.values()) == 100 and 4 <= sizes["validation"] <= 18 and 4 <= sizes["test"] <= 18
    with pytest.raises(UserError, match="registered already"):
        pj.Task("api_held_out", rows[1:], inputs="{text}", targets="{label}").register()
    with pytest.raises(UserError, match="'api_few' has too few rows to hold some out for 'validation'"):
        pj.Task("api_few", ROWS[:1]).register()
    for wrong in ("ab", ("a", "b", "c")):
        with pytest.raises(UserError, match=r"Row 2 is .*; give a pair \(input, target\)"):
            pj.Task("api_wrong", [*ROWS[:1], wrong]).register()
    del _registered["api_held_out"]


def test_names() -> None:
    assert {"Decoding", "Model", "Task", "load"} <= set(dir(pj))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pj.lod  # noqa: B018
    assert trees.count({"a": np.zeros(3)}) == 3
