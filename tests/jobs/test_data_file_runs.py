"""Runs on a user's file, from the command to the results."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny_tasks import reviews

from promot_jax import main
from promot_jax.data import files
from promot_jax.results import schema

pytestmark = pytest.mark.usefixtures("registry")
TEMPLATES = {"INPUT_TEMPLATE": "Review: {noun} was {label}\\nLabel:", "TARGET_TEMPLATE": "{label}"}


def command(folder: Path, gin_file: str, workdir: Path, **macros: Any) -> list[str]:
    """As `tiny.command`, on data: the lengths are those of the data."""
    return tiny.command(folder, gin_file, workdir, TASK_FEATURE_LENGTHS=None, **macros)


def write(folder: Path, change: str = "") -> Path:
    """The rows of `tiny_review` as a folder of CSV files."""
    files.read.cache_clear()
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "noun", "label"])
            writer.writeheader()
            writer.writerows([{**row, "noun": f"{row['noun']}{change}"} for row in reviews(split)])
    return folder


def test_a_run_on_a_file(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its results are those of the same rows as a registered task, and other data are not taken for it."""
    data, workdir = write(tmp_path / "film_reviews"), tmp_path / "run"
    argv = command(tiny_folder, "finetune.gin", workdir, DATA=data, TRAIN_STEPS=2, **TEMPLATES)
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert "Task 'film_reviews' is" in out and "no training row is left out" in out
    run = schema.read_run(workdir)
    assert run.target.task == "film_reviews" and run.target.metric == "accuracy" and set(run.icl) == {"1", "3"}
    experiment = json.loads((workdir / "settings.json").read_text())["experiment"]
    assert experiment["data"]["rows"] == files.read(str(data)).digest and "path" not in experiment["data"]
    assert set(experiment["feature_lengths"]) == {"inputs", "targets"}
    # More of the final evaluation: the way that the message names.
    assert main.main([*argv, "--gin.Evaluation.target_examples=5"]) == 2
    assert "results.json to evaluate it again" in capsys.readouterr().err
    (workdir / "results.json").unlink()
    assert main.main([*argv, "--gin.Evaluation.target_examples=5"]) == 0
    assert "[finetune] is finished" in capsys.readouterr().out and schema.read_run(workdir).target.n == 5
    write(data, change="s")
    assert main.main(argv) == 2
    assert "was started with experiment/data/rows = " in capsys.readouterr().err


def test_inspection(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "film_reviews")
    lengths = {"inputs": 33, "targets": 3}
    gin = [f"--gin.{name}={value}" for name, value in (TEMPLATES | {"DATA": data, "SHOW": 5}).items()]
    checkpoint = f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder / 'tiny.gguf'}"
    argv = ["--gin_file=inspect_data.gin", f"--workdir={tmp_path / 'shown'}", "--gin.ICL_MIXTURE=", checkpoint, *gin]
    assert main.main([*argv, f"--gin.TASK_FEATURE_LENGTHS={lengths}"]) == 0
    out = capsys.readouterr().out
    shown = [json.loads(line) for line in (tmp_path / "shown" / "examples.jsonl").read_text().splitlines()]
    assert len(shown) == 5
    for row in shown:
        assert f"{row['input']} [[{row['target']}]]" in out
        assert row["left_out"] == any(row["tokens"][key] > lengths[key] for key in lengths)
    assert f"TASK_FEATURE_LENGTHS = {lengths}: " in out and "parameters" not in out  # of a model that is loaded


def test_a_chat_file_and_a_model_without_a_template(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "bad"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": chat}))
    argv = command(tiny_folder, "finetune.gin", tmp_path / "run", DATA=tmp_path / "talk.jsonl")
    assert main.main(argv) == 2
    assert "tiny.gguf has no chat template, which data with messages need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("macros", "says"),
    [
        ({"DATA": "nowhere.csv"}, "There is no data at 'nowhere.csv'; set DATA"),
        ({"DATA": "a.csv", "INPUT_TEMPLATE": "{txt}", "TARGET_TEMPLATE": "{label}"}, "(did you mean 'text'?)"),
    ],
)
def test_wrong_data_are_said_before_tensorflow_is_imported(
    macros: dict[str, str],
    says: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("text,label\na,b\n")
    monkeypatch.setattr("promot_jax.experiments.session.tasks_of", lambda _: pytest.fail("looked at the tasks"))
    assert main.main(command(tiny_folder, "promot.gin", tmp_path / "run", **macros)) == 2
    assert says in capsys.readouterr().err
