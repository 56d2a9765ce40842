"""What the gin files in gin/ say: each run is what its name promises, every macro reaches what it is named after."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from promot_jax import assets, main, methods
from promot_jax.config import binding, gin_files
from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment

RUNS = (
    "promot_stage1.gin",
    "promot_stage2.gin",
    "finetune.gin",
    "icl_eval.gin",
    "infer.gin",
    "export.gin",
    "gradient_alignment.gin",
    "promot.gin",
    "demo.gin",
    "compare.gin",
)
TRAINING = ("promot_stage1.gin", "promot_stage2.gin", "finetune.gin")


def bound(*names: str, **macros: object) -> dict[str, Any]:
    """The arguments that gin files and some macros give to the job, and the job's name as "job"."""
    paths = [gin_files.folder() / name for name in names]
    job = binding.bind(main.CONFIGURABLES, paths, [(macro, str(value)) for macro, value in macros.items()])
    return {"job": job.func.__name__, **job.keywords}


def test_every_run_is_here() -> None:
    found = {name for name, path in gin_files.of_package().items() if "run.job" in path.read_text("utf-8")}
    assert found >= set(RUNS)


def is_run(name: str) -> bool:
    return ("", "run", "job") in gin_files.settings([gin_files.folder() / name])


@pytest.mark.parametrize(
    "name", [name for name in gin_files.of_package() if is_run(name) and name != "paper/common.gin"]
)
def test_header_says_how_to_run_it(name: str) -> None:
    header = re.match(r"(#.*\n)+", (gin_files.folder() / name).read_text("utf-8"))
    assert header and f"python -m promot_jax.main --gin_file={name}" in header[0]
    assert re.match(r"# \w.*\n# Command: .*\n# Hardware: .* Time: .*\bExpected\b", header[0], re.DOTALL)


@pytest.mark.parametrize("name", gin_files.of_package())
def test_every_file_is_short(name: str) -> None:
    lines = (gin_files.folder() / name).read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) < 40 and max(map(len, lines)) <= 130


@pytest.mark.parametrize("name", RUNS)
def test_macros_reach_the_experiment(name: str) -> None:
    lengths = {"inputs": 7, "targets": 3}
    experiment = bound(
        name, INITIAL_CHECKPOINT_PATH="m.gguf", MIXTURE_OR_TASK_NAME="t", MIXTURE_OR_TASK_MODULE="some.module",
        TASK_FEATURE_LENGTHS=lengths, ICL_MIXTURE="i", PROMPT_LENGTH=5, PROMPT_PATH="p.npy", SEED=9,
        DATA_SHARDS=2,
    )["experiment"]  # fmt: skip
    assert isinstance(experiment, Experiment)
    assert (experiment.checkpoint, experiment.task, experiment.modules) == ("m.gguf", "t", "some.module")
    assert (experiment.feature_lengths, experiment.icl_mixture, experiment.seed) == (lengths, "i", 9)
    assert (experiment.prompt_length, experiment.prompt_path, experiment.data_shards) == (5, "p.npy", 2)


@pytest.mark.parametrize("name", TRAINING)
def test_macros_reach_the_training(name: str) -> None:
    macros = {"TRAIN_STEPS": 7, "BATCH_SIZE": 6, "LEARNING_RATE": 0.5, "EVAL_PERIOD": 3}
    arguments = bound(name, **macros)
    training = arguments["training"]
    assert (training.steps, training.batch_size, training.eval_period) == (7, 6, 3)
    assert training.optimizer.learning_rate == 0.5
    assert arguments["job"] == "train_stage"
    assert arguments["stage"] == {"finetune.gin": "finetune"}.get(name, name[7:13])


@pytest.mark.parametrize("name", ["promot_stage2.gin", "finetune.gin"])
def test_dropout_reaches_model_tuning(name: str) -> None:
    training = bound(name, DROPOUT_RATE=0.1, LABEL_SMOOTHING=0.2)["training"]
    assert (training.dropout_rate, training.label_smoothing) == (0.1, 0.2)


def test_one_budget_for_stage_2_and_fine_tuning() -> None:
    """The comparison is at the same steps, batch size, optimizer and learning rate."""
    tuning = bound("demo.gin")["tuning"]
    assert bound("finetune.gin")["training"] == bound("promot_stage2.gin")["training"] == tuning.model
    assert bound("promot.gin")["tuning"] == tuning
    compared = bound("compare.gin")["tuning"]
    assert (compared.prompt, compared.model) == (tuning.prompt, tuning.model)
    (finetune,), (first, second) = tuning.method("finetune").stages, tuning.method("promot").stages
    assert tuning.of(second) == tuning.of(finetune) == tuning.model
    assert bound("promot_stage1.gin")["training"] == tuning.prompt == tuning.of(first)


def test_every_run_has_the_same_model_and_data() -> None:
    first, *others = (bound(name, PROMPT_PATH="p.npy")["experiment"] for name in RUNS)
    assert all(other == first for other in others)
    assert first.checkpoint.partition(":")[2] in assets.ASSETS and first.dtype in ("float32", "bfloat16")


def test_runs_that_take_a_prompt() -> None:
    assert bound("promot_stage2.gin")["experiment"].prompt_path == "runs/promot_stage1"  # where stage 1 leaves it
    assert bound("icl_eval.gin")["experiment"].prompt_path == bound("infer.gin")["experiment"].prompt_path == ""
    several = bound("infer.gin", PROMPT_PATH={"a": "runs/a", "b": "b.npy"})["experiment"].prompt_path
    assert several == {"a": "runs/a", "b": "b.npy"}


def test_demonstration_compares_three_methods() -> None:
    arguments = bound("demo.gin")
    assert arguments["job"] == "compare" and arguments["methods"] == ("pretrained", "finetune", "promot")
    assert len(arguments["seeds"]) == 1 and bound("demo.gin", SEEDS=[0, 1, 2])["seeds"] == [0, 1, 2]
    assert arguments["experiment"].evaluation.shots == (1, 4)


def test_comparison_takes_methods_seeds_settings_and_tasks() -> None:
    macros = {
        "METHODS": ["promot_1shot"],
        "SEEDS": [4],
        "TASKS": {"a": {}},
        "WAIT": False,
        "STALE": 9.0,
        "REPORT": "all",
        "SERVE": 0,
        "MARGIN": 2.0,
        "VARIED": {"l2sp_weight": [0.1]},
        "LEARNING_RATES": {"model": [0.1]},
        "STRENGTHS": {"kl": [0.1]},
    }
    arguments = bound("compare.gin", **macros, EXEMPLAR_DRAWS=5)
    assert arguments["job"] == "compare" and arguments["experiment"].evaluation.exemplar_draws == 5
    assert (arguments["methods"], arguments["seeds"], arguments["tasks"]) == (["promot_1shot"], [4], {"a": {}})
    assert (arguments["learning_rates"], arguments["wait"], arguments["stale"]) == ({"model": [0.1]}, False, 9.0)
    assert arguments["report"] == "all" and arguments["serve"] == 0
    assert (arguments["margin"], arguments["strengths"]) == (2.0, {"kl": [0.1]})
    assert arguments["varied"] == {"l2sp_weight": [0.1]}


def test_demonstration_tasks_are_registered() -> None:
    """The names in gin/defaults.gin exist: a fine-tuning task with labels, and at least 8 ICL tasks."""
    import promot_jax.data  # noqa: F401, silences TensorFlow
    from promot_jax.data import examples as text

    experiment = bound("demo.gin")["experiment"]
    text.import_tasks([experiment.modules])
    splits = {experiment.evaluation.split, experiment.evaluation.curve_split, "train"}
    icl = text.task_names(experiment.icl_mixture)
    assert len(icl) >= 8 and experiment.task not in icl
    for name in [*text.task_names(experiment.task), *icl]:
        assert splits <= set(text.get(name).splits)


def test_paper_settings() -> None:
    """Section 4 of the paper; its learning rates belong to a step counter that goes on from the checkpoint's."""
    arguments = bound("promot.gin", "paper.gin")
    prompt, model = arguments["tuning"].prompt, arguments["tuning"].model
    assert (prompt.steps, prompt.batch_size, prompt.optimizer.learning_rate) == (5000, 64, 0.2)
    assert (model.steps, model.batch_size, model.optimizer.learning_rate) == (1000, 64, 1e-3)
    for training in (prompt, model):
        assert (training.optimizer.name, training.optimizer.decay_offset) == ("adafactor", 1_100_000)
        assert (training.dropout_rate, training.label_smoothing) == (0.1, 0.1)
    assert (prompt.optimizer.scale_by_parameter, model.optimizer.scale_by_parameter) == (False, True)
    experiment = arguments["experiment"]
    assert (experiment.prompt_length, experiment.prompt_init.method, experiment.prompt_init.scale) == (
        100,
        "uniform",
        0.5,
    )


def test_beam_search_is_given_after_a_run() -> None:
    for name in RUNS:
        greedy, beams = (bound(*names)["experiment"].evaluation for names in ((name,), (name, "beam.gin")))
        assert (greedy.decoding.beams, beams.decoding.beams, beams.decoding.length_penalty) == (1, 4, 0.6)
        assert dataclasses.replace(beams, decoding=greedy.decoding) == greedy


def test_infer_has_something_to_say() -> None:
    assert all(isinstance(text, str) and text for text in bound("infer.gin")["inputs"])
    assert bound("infer.gin", INPUTS=Path("questions.txt"))["inputs"] == "questions.txt"
    assert bound("infer.gin", INPUTS="-")["inputs"] == "-"


@pytest.mark.parametrize("name", methods.hyperparameters())
def test_the_macro_of_a_hyperparameter_is_its_name_in_capitals(name: str) -> None:
    """And gin may set every one of them without a line outside of the method's file."""
    field = methods.hyperparameters()[name]
    macros = gin_files.settings([gin_files.folder() / "baselines.gin"])
    value = macros.get(("", "Tuning", name))
    assert value is None or str(value.value) == f"%{name.upper()}" or name in ("lora", "replay")  # objects of their own
    if field.type is float:
        assert bound("method.gin", **{f"Tuning.{name}": 0.5})["tuning"].settings[name] == 0.5


def test_files_that_are_gone_say_what_to_do() -> None:
    for name, wanted in (("l2sp", "l2sp"), ("one_shot", "NAME_1shot")):
        with pytest.raises(UserError, match=rf"--gin_file=method.gin --gin.METHOD={wanted}"):
            gin_files.find(f"methods/{name}.gin", [gin_files.folder()])
    old, new = (gin_files.settings([gin_files.folder() / name]) for name in ("rivals.gin", "baselines.gin"))
    assert old == new
