"""What a folder was started with: damaged, missing, and what its checkpoints are held against."""

from pathlib import Path

import pytest

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.experiments.resume_guard import keep_settings

SETTINGS = {"stage": "stage1", "training": {"steps": 4, "log_period": 10, "optimizer": {"learning_rate": 0.3}}}


def test_the_digest_is_that_of_what_changes_results(tmp_path: Path) -> None:
    training = SETTINGS["training"]
    assert isinstance(training, dict)
    digest = keep_settings(tmp_path / "a", SETTINGS)
    quieter = {"stage": "stage1", "training": training | {"log_period": 1}}
    assert digest == keep_settings(tmp_path / "a", quieter) == keep_settings(tmp_path / "b", quieter)
    assert digest != keep_settings(tmp_path / "c", {"stage": "stage1", "training": training | {"steps": 5}})


@pytest.mark.parametrize("finished", ["results.json", "stage.json"])
def test_finished_work_without_its_settings_is_refused(tmp_path: Path, finished: str) -> None:
    """With other settings it would be taken for their result; the right value is what the run was started with."""
    keep_settings(tmp_path, SETTINGS, finished)
    (tmp_path / finished).write_text("{}")
    keep_settings(tmp_path, SETTINGS, finished)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=f"holds a finished {finished}, but no settings.json .*: put it back, or"):
        keep_settings(tmp_path, SETTINGS | {"stage": "stage2"}, finished)
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "\x00", '"text"', "[" * 100000, '{"a": NaN}'])
def test_damaged_settings_are_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings.json.*put it back, or delete .* to start again"):
        keep_settings(tmp_path, SETTINGS)


def test_settings_that_are_a_folder_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(UserError, match=r"settings.json.*put it back"):
        keep_settings(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("experiment/evaluation/examples", "delete .*results.json to evaluate it anew, what it trained is kept"),
        ("training/steps", "to train a finished model further, give --gin.INITIAL_CHECKPOINT_PATH="),
        ("experiment/evaluation/curve_examples", "give another --workdir, or delete the folder to start again.$"),
    ],
)
def test_a_finished_run_with_more_of_something(tmp_path: Path, key: str, advice: str) -> None:
    """The message names the way that keeps what is done."""
    keep_settings(tmp_path, trees.unflatten({key: 4}))
    with pytest.raises(UserError, match=advice):
        keep_settings(tmp_path, trees.unflatten({key: 8}))
