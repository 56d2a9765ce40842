"""The final evaluation, and the scores of the test split at every checkpoint."""

import json
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


def test_every_checkpoint_is_scored_on_the_test_split(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends as without the setting, and does not score its best checkpoint twice."""
    runs = []
    for tested in (False, True):
        workdir = tiny_folder / f"tested_{tested}"
        macros = {"Evaluation.curve_test": tested, "METHOD": "promot", "EVAL_PERIOD": 2, "TRAIN_STEPS": 4}
        assert main.main(tiny.command(tiny_folder, "method.gin", workdir, **macros)) == 0
        runs.append(schema.read_run(workdir))
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
    assert capsys.readouterr().out.count("Traceback") == 0
    # Those scores are of this final evaluation: with another one, they would not be the run's.
    (tiny_folder / "tested_True/results.json").unlink()
    changed = {**macros, "Evaluation.examples": 1}
    assert main.main(tiny.command(tiny_folder, "method.gin", tiny_folder / "tested_True", **changed)) == 2
    error = capsys.readouterr().err
    assert "stage2 was started with experiment/evaluation/examples" in error and "results.json" not in error
