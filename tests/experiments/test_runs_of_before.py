"""Runs that the code of commit 0979974 left are read, reported, resumed and exported.

`fixtures/runs_of_before.tar.xz` was made by that code, with the script in it (`make.py`): `finished/` is a whole
comparison (`demo.gin`), `interrupted/` ProMoT with the same settings (`promot.gin`), preempted in stage 2.
"""

import json
import shutil
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny_tasks  # noqa: F401, registers
from random_results import read_comparison

from promot_jax import main
from promot_jax.checkpoints import pretrained, stage_folder
from promot_jax.checkpoints.orbax import Saved
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.results import schema
from promot_jax.results.records import replace
from promot_jax.results.scores import Output

FIXTURE = Path(__file__).parents[1] / "fixtures" / "runs_of_before.tar.xz"


@pytest.fixture(name="unpacked", scope="module")
def _unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(name="folder")
def _folder(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, as the current folder: their paths are relative."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(gin_file: str, workdir: str, **macros: str) -> list[str]:
    overrides = [f"--gin.{name}={value}" for name, value in macros.items()]
    return [f"--gin_file={gin_file}", "--gin_file=tiny.gin", f"--workdir={workdir}", *overrides]


def test_everything_is_read(folder: Path) -> None:
    comparison = read_comparison(folder / "finished")
    scores = {method: run.target.score for method, (run,) in comparison.methods.items() if run.target}
    assert scores == {"pretrained": 0, "finetune": 60, "promot": 60}
    assert comparison.spread["best"]["promot"]["target"].mean == 60 and comparison.cells[2].state == "finished"
    promot = schema.read_run(folder / "finished/promot/seed_0")
    assert [(point.stage, point.step) for point in promot.curve][-2:] == [("stage2", 30), ("stage2", 60)]
    assert len(promot.curve[-1].draws) == 2 and promot.best_step == {"stage1": 30, "stage2": 60}
    assert comparison.methods["promot"][0].matched and promot.samples and promot.versions["jax"]
    stage = stage_folder.describe(folder / "finished/promot/seed_0/stage2")
    assert stage and (stage.trains, stage.steps, stage.curve) == (["model"], 60, promot.curve[-3:])
    files = sorted(folder.rglob("*.jsonl"))
    rows = [msgspec.convert(json.loads(line), Output) for file in files for line in file.read_text().splitlines()]
    assert len(rows) > 100 and {row.step for row in rows} == {None, 0, 30, 60} and {row.draw for row in rows} >= {0, 1}


def test_a_finished_comparison_is_reported_and_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_comparison(folder / "finished")
    assert main.main(command("demo.gin", "finished")) == 0
    printed = capsys.readouterr().out
    assert "[finetune] is finished" in printed and "] trains " not in printed
    assert any(line.split() == ["tiny_review", "(accuracy,", "target)", "0.0", *["60.0", "(+60.0)"] * 2]
               for line in printed.splitlines())  # fmt: skip
    # Spreads are computed anew: an interval needs three values now.
    assert replace(read_comparison(folder / "finished"), spread={}) == replace(before, spread={})
    assert "60.0" in (folder / "finished/report.md").read_text()
    assert "60.0" in (folder / "finished/report.html").read_text()


def test_an_interrupted_run_is_resumed_to_the_end_of_one_that_was_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(command("promot.gin", "interrupted")) == 0
    assert "[stage2] resumes from step 42" in capsys.readouterr().out
    run, uninterrupted = schema.read_run(folder / "interrupted"), schema.read_run(folder / "finished/promot/seed_0")
    assert (run.best_step, run.base) == (uninterrupted.best_step, uninterrupted.base)
    # The fine-tuned task, and those that share labels with it, had a format share then.
    assert run.target is not None and uninterrupted.target is not None
    assert replace(run.target, format_share=None) == replace(uninterrupted.target, format_share=None)
    plain = [{shots: (icl.norm_avg, icl.ci95) for shots, icl in each.icl.items()} for each in (run, uninterrupted)]
    assert plain[0] == plain[1]
    losses = [[point.loss or 0.0 for point in each.curve] for each in (run, uninterrupted)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    shapes = Saved(folder / "interrupted/stage2/checkpoints").shapes(60)
    loaded = [pretrained.load(str(folder / path), Partitioner()) for path in ("interrupted", "finished/promot/seed_0")]
    assert shapes.keys() == Saved(folder / "finished/promot/seed_0/stage2/checkpoints").shapes(60).keys()
    ours, theirs = (model.params["decoder"]["layers"]["mlp"] for model in loaded)
    for name in ours:
        np.testing.assert_allclose(ours[name]["kernel"], theirs[name]["kernel"], rtol=1e-4, atol=1e-6)


def test_settings_that_changed_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command("promot.gin", "interrupted", LEARNING_RATE="0.5")) == 2
    assert "was started with" in capsys.readouterr().err


def test_a_finished_run_is_exported(folder: Path) -> None:
    run = "finished/promot/seed_0"
    macros = {"INITIAL_CHECKPOINT_PATH": f"'{run}'", "PROMPT_PATH": f"'{run}/stage1'"}
    assert main.main(command("export.gin", "exported", **macros)) == 0
    summary = json.loads((folder / "exported/results.json").read_text())
    want = pretrained.load(run, Partitioner())
    assert summary["fingerprint"] == want.fingerprint != want.base and summary["prompts"] == {"tiny_review": 4}
    assert pretrained.load("exported/stripped", Partitioner()).fingerprint == want.fingerprint
    assert {path.name for path in (folder / "exported").iterdir()} >= {"stripped", "with_prompts"}
