"""The final evaluation, and the scores of the test split at every checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from promot_jax import main
from promot_jax.results import schema
from promot_jax.results.records import replace


def _without_time(run: schema.Run) -> schema.Run:
    """A run less what differs between two equal ones."""
    curve = [replace(point, test=None) for point in run.curve]
    return replace(run, seconds=0.0, curve=curve)


def _command(folder: Path, tested: bool, **macros: object) -> list[str]:
    """Of a run without and with scores of the test split at every checkpoint."""
    given = {"Evaluation.curve_test": tested, "METHOD": "promot", "EVAL_PERIOD": 2, "TRAIN_STEPS": 4}
    return tiny.command(folder, "method.gin", folder / f"tested_{tested}", **given, **macros)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path) -> tuple[schema.Run, schema.Run]:
    """Both, finished."""
    assert [main.main(_command(tiny_folder, tested)) for tested in (False, True)] == [0, 0]
    return schema.read_run(tiny_folder / "tested_False"), schema.read_run(tiny_folder / "tested_True")


def test_every_checkpoint_is_scored_on_the_test_split(tiny_folder: Path, runs: tuple[schema.Run, schema.Run]) -> None:
    """The run ends as without the setting, and does not score its best checkpoint twice."""
    plain, whole = runs
    assert _without_time(whole) == _without_time(plain)
    points = {point.step: point.test for point in whole.curve if point.stage == "stage2"}
    assert sorted(points) == [0, 2, 4] and all(points.values())
    best = points[whole.best_step["stage2"]]
    assert best and (best.target, best.icl) == (whole.target, whole.icl)
    assert all(point.test is None for point in whole.curve if point.stage == "stage1")  # its model is the base model
    for name in ("target", "icl_1shot"):
        files = [tiny_folder / f"tested_{tested}/outputs/{name}.jsonl" for tested in (False, True)]
        before, after = ([json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in files)
        assert after == before


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.usefixtures("runs")
def test_a_finished_run_without_its_prompt_is_not_called_finished(
    damage: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_folder / "tested_False/stage1/prompt/prompt.npy"
    kept = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(kept[:-8])
    try:
        assert main.main(_command(tiny_folder, False)) == 2
    finally:
        file.write_bytes(kept)
    error = capsys.readouterr().err
    assert "stage1 is finished, but: " in error and "prompt.npy" in error
    assert f"delete {tiny_folder / 'tested_False'} to train it anew" in error
    assert main.main(_command(tiny_folder, False)) == 0


@pytest.mark.usefixtures("runs")
def test_a_finished_run_without_its_model_is_not_called_finished(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tiny_folder / "tested_False/stage2/checkpoints"
    checkpoints.rename(checkpoints.with_name("moved"))
    try:
        assert main.main(_command(tiny_folder, False)) == 2
    finally:
        checkpoints.with_name("moved").rename(checkpoints)
    error = capsys.readouterr().err
    assert f"{checkpoints}/" in error and f"is gone: put it back, or delete {tiny_folder / 'tested_False'}" in error
    assert main.main(_command(tiny_folder, False)) == 0


@pytest.mark.usefixtures("runs")
def test_a_finished_run_whose_settings_were_deleted(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rate would be written beside results that it did not make."""
    file = tiny_folder / "tested_False/settings.json"
    kept = file.read_bytes()
    file.unlink()
    try:
        assert main.main(_command(tiny_folder, False, LEARNING_RATE=0.5)) == 2
        assert not file.exists()
    finally:
        file.write_bytes(kept)
    assert "holds a finished results.json, but no settings.json" in capsys.readouterr().err


def test_what_a_final_evaluation_takes_from_the_curve(
    tiny_folder: Path, runs: tuple[schema.Run, schema.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of another evaluation would not be the run's, and outputs may have been damaged meanwhile."""
    (tiny_folder / "tested_True/results.json").unlink()
    assert main.main(_command(tiny_folder, True, **{"Evaluation.examples": 1})) == 2
    error = capsys.readouterr().err
    assert "stage2 was started with experiment/evaluation/examples" in error and "results.json" not in error
    file = tiny_folder / f"tested_True/stage2/outputs/test_{runs[1].best_step['stage2']:06d}/target.jsonl"
    kept = file.read_bytes()
    half = b"".join(kept.splitlines(keepends=True)[::2])
    for damage in (kept[:-9], half, b"\xff" + kept, b"[" * 100_000, kept.replace(b'"id"', b'"di"'), None):
        file.unlink() if damage is None else file.write_bytes(damage)
        assert main.main(_command(tiny_folder, True)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "target.jsonl are damaged (" in line and f"delete {file.parent}, and they are made again" in line
    shutil.rmtree(file.parent)
    assert main.main(_command(tiny_folder, True)) == 0
    assert _without_time(schema.read_run(tiny_folder / "tested_True")) == _without_time(runs[1])
