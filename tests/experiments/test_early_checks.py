"""Wrong names are said in a second, without TensorFlow."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from promot_jax.checkpoints.locate import spelled
from promot_jax.data import examples
from promot_jax.errors import UserError
from promot_jax.experiments import early_checks
from promot_jax.experiments.settings import Experiment

OWN = ("promot_jax.tasks.demo", "promot_jax.tasks.paper")
RIGHT = Experiment("asset:smollm2-135m-instruct", "movie_sentiment", OWN, {"inputs": 48, "targets": 2}, "demo_icl")


def test_tasks_of_ours_are_known_without_importing_them() -> None:
    """The reference is SeqIO's registry, once the modules have been imported."""
    examples.import_tasks(OWN)
    for mixture in ("demo_icl", "icl", "rte_enfr", "movie_and_tweets"):
        early_checks.check_names(dataclasses.replace(RIGHT, task=mixture, icl_mixture=f"{mixture}_4shot"))
        for name in examples.task_names(mixture):
            early_checks.check_names(dataclasses.replace(RIGHT, task=f"{name}_1shot"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "movie_sentimnet"},
            r"'movie_sentimnet' \(did you mean 'movie_sentiment'\?\); set MIXTURE",
        ),
        ({"icl_mixture": "demo_ilc"}, r"'demo_ilc' \(did you mean 'demo_icl'\?\); set ICL_MIXTURE"),
        ({"modules": "promot_jax.tasks.demos"}, "There is no task module 'promot_jax.tasks.demos'"),
        ({"modules": ("nowhere.tasks",)}, "There is no task module 'nowhere.tasks'"),
        ({"checkpoint": "runs/promot"}, "There is no model at 'runs/promot'; a model of the Hugging Face hub is hf://"),
        ({"prompt_path": "runs/stage1"}, "No prompt at runs/stage1; give a prompt.npy"),
        ({"prompt_path": {"one": "", "two": "nowhere.npy"}}, "No prompt at nowhere.npy; give a prompt.npy"),
        ({"checkpoint": "/nowhere/model"}, "There is no model at '/nowhere/model'; set INITIAL_CHECKPOINT_PATH."),
    ],
)
def test_wrong_names(changes: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=message):
        early_checks.check_names(dataclasses.replace(RIGHT, **changes))


def test_a_user_module_may_have_any_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks_here.py").write_text("raise RuntimeError('never imported here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    early_checks.check_names(dataclasses.replace(RIGHT, task="mine", modules=("my_tasks_here", *OWN)))


def test_organisation_and_name_are_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `transformers`, whose `from_pretrained` takes `org/name` where no such folder is."""
    monkeypatch.chdir(tmp_path)
    assert spelled("HuggingFaceTB/SmolLM2-135M") == "hf://HuggingFaceTB/SmolLM2-135M"
    (tmp_path / "HuggingFaceTB").mkdir()  # a folder here: a mistake in a local path
    assert spelled("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    for path in ("asset:smollm2-135m-instruct", "/a/b", "../b", "./b", "a/b/c", "model.gguf", "hf://a/b", "gs://a/b"):
        assert spelled(path) == path


@pytest.mark.parametrize("job", ["promot.gin", "infer.gin"])
def test_no_job_imports_tensorflow_for_a_wrong_name(job: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from promot_jax import main\n"
        "status = main.main(sys.argv[1:])\n"
        "print(status, 'tensorflow' in sys.modules, 'seqio' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [f"--gin_file={job}", "--gin.INITIAL_CHECKPOINT_PATH=./nowhere"]
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"], done.stdout + done.stderr
    assert "There is no model at './nowhere'" in done.stderr
