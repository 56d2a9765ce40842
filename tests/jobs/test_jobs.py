"""Every run that comes with the package, from gin file to results, on a model of 28 thousand weights."""

import dataclasses
import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from forward import target_logits
from random_results import read_comparison

import promot_jax as pj
import promot_jax.data
from promot_jax import files as files_module
from promot_jax import main, trees
from promot_jax.checkpoints import pretrained, stage_folder
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data.encoding import Encoder
from promot_jax.data.vocabularies import controls
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.sampler import Sampler
from promot_jax.experiments import resume_guard
from promot_jax.experiments import stage as runs
from promot_jax.experiments.session import Session
from promot_jax.experiments.settings import Experiment
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.params import soft_prompts
from promot_jax.params.fingerprint import fingerprint
from promot_jax.report.terminal import printable
from promot_jax.results import schema
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training


class Run(NamedTuple):
    """A finished run: where it is, and the model it had loaded."""

    workdir: Path
    loaded: Pretrained


def run(folder: Path, gin_file: str, workdir: Path, **macros: object) -> Run:
    """Runs a gin file of the package on the tiny model, which must come out of it as it was."""
    loaded: list[Pretrained] = []
    load = pretrained.load

    def keep(*args: Any, **kwargs: Any) -> Pretrained:
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    before = digest(folder / "tiny.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load", keep)
        assert main.main(tiny.command(folder, gin_file, workdir, **macros)) == 0
    assert digest(folder / "tiny.gguf") == before
    return Run(workdir, loaded[-1])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, gin_file: str, workdir: Path, **macros: object) -> str:
    """Returns the one sentence on stderr of a run that ends with status 2."""
    assert main.main(tiny.command(folder, gin_file, workdir, **macros)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files below a folder that match."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    assert found
    return {str(path.relative_to(folder)): digest(path) for path in sorted(found)}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if not tag.startswith("generations/")]
    return {tag: [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)] for tag in tags}


def texts(folder: Path) -> dict[str, dict[int, str]]:
    """TensorBoard's texts in a folder, by task and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("generations/")]
    found = {}
    for tag in tags:
        found[tag.partition("/")[2]] = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
    return found


def trained(folder: Path) -> dict[str, np.ndarray]:
    """What the best checkpoint of a stage holds, by path."""
    description = stage_folder.describe(folder)
    assert description is not None
    checkpoints = Checkpoints(folder / "checkpoints")
    shapes = checkpoints.shapes(description.best_step)
    zeros = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    like = Partitioner().place(trees.unflatten(zeros))
    found = trees.flatten(checkpoints.parameters(description.best_step, like))
    checkpoints.close()
    return {path: np.asarray(leaf) for path, leaf in found.items()}


@pytest.fixture(name="stage1", scope="module")
def _stage1(tiny_folder: Path) -> Run:
    return run(tiny_folder, "promot_stage1.gin", tiny_folder / "stage1")


@pytest.fixture(name="stage2", scope="module")
def _stage2(tiny_folder: Path, stage1: Run) -> Run:
    before = digests(stage1.workdir / "prompt", "*")
    # A low rate: a model that has collapsed into one answer would say the same with and without a prompt.
    done = run(tiny_folder, "promot_stage2.gin", tiny_folder / "stage2", PROMPT_PATH=stage1.workdir, LEARNING_RATE=2e-3)
    assert digests(stage1.workdir / "prompt", "*") == before
    return done


@pytest.fixture(name="finetune", scope="module")
def _finetune(tiny_folder: Path) -> Run:
    return run(tiny_folder, "finetune.gin", tiny_folder / "finetune")


@pytest.mark.parametrize(
    ("name", "method"), [("stage1", "prompt_tuning"), ("stage2", "promot"), ("finetune", "finetune")]
)
def test_a_stage_leaves_its_results(name: str, method: str, request: pytest.FixtureRequest) -> None:
    workdir = request.getfixturevalue(name).workdir
    found = schema.read_run(workdir)
    assert (found.method, found.seed, found.steps) == (method, 0, {name: 6})
    assert found.target.task == "tiny_review" and found.target.n == 10
    assert set(found.icl) == {"1", "3"}
    for entry in found.icl.values():
        assert {task: one.n for task, one in entry.tasks.items()} == {"tiny_colour": 6, "tiny_size": 6}
    assert [(point.stage, point.step) for point in found.curve] == [(name, step) for step in (0, 2, 4, 6)]
    assert found.versions["jax"] and found.seconds > 0

    operative = (workdir / "operative_config.gin").read_text()
    assert "Training.steps = %" in operative and "tiny_review" in operative

    assert {path.name: len(rows(path)) for path in (workdir / "outputs").iterdir() if path.name[:4] != "step"} == {
        "target.jsonl": 10,
        "icl_1shot.jsonl": 12,
        "icl_3shot.jsonl": 12,
    }
    for row in rows(workdir / "outputs" / "icl_3shot.jsonl"):
        assert row["shots"] == 3 and {"task", "id", "input", "target", "raw", "output"} <= row.keys()
    assert {path.name for path in (workdir / "outputs").glob("step_*")} == {
        f"step_00000{i}.jsonl" for i in (0, 2, 4, 6)
    }

    curves = scalars(workdir / "events")
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert curves["eval/target"] == [(point.step, pytest.approx(point.target)) for point in found.curve]
    losses = curves["eval/validation_loss"]
    assert losses == [(point.step, pytest.approx(point.validation_loss)) for point in found.curve]
    assert losses[-1][1] < losses[0][1] and losses[-1][1] != curves["train/mean_loss"][-1][1]
    assert "eval/loss" not in curves  # it was that of training
    shown = ["tiny_review"] if name == "stage1" else ["tiny_colour", "tiny_review", "tiny_size"]
    pages = texts(workdir / "events")
    assert sorted(pages) == shown
    for task, page in pages.items():
        outputs = [row for row in rows(workdir / "outputs" / "step_000006.jsonl") if row["task"] == task]
        assert list(page) == [0, 2, 4, 6] and page[6].count("<strong>output") == 3
        assert all(f"<pre>{html.escape(row['input'])}</pre>" in page[6] for row in outputs[:3])


def test_stage1_trains_the_prompt_and_nothing_else(stage1: Run) -> None:
    assert fingerprint(stage1.loaded.params) == stage1.loaded.base
    prompt = np.load(stage1.workdir / "prompt" / "prompt.npy", allow_pickle=False)
    assert prompt.shape == (4, tiny.EMBED) and prompt.dtype == np.float32
    info = json.loads((stage1.workdir / "prompt" / "prompt.json").read_text())
    best = stage_folder.describe(stage1.workdir).best_step
    assert info | {"score": 0} == {
        "task": "tiny_review", "length": 4, "step": best, "score": 0, "initialiser": "vocabulary",
        "base": stage1.loaded.base, "values": fingerprint({"prompt": prompt}),
    }  # fmt: skip
    saved = trained(stage1.workdir)
    assert list(saved) == ["prompt/tiny_review"]
    np.testing.assert_array_equal(saved["prompt/tiny_review"], prompt)
    rows_at_start = stage1.loaded.params["token_embedder"]["embedding"]
    assert not (prompt[:, None] == np.asarray(rows_at_start)).all(-1).any()  # every row has moved


def test_stage2_trains_the_model_and_nothing_else(stage2: Run) -> None:
    assert fingerprint(stage2.loaded.params) == stage2.loaded.base  # the caller's arrays were not given away
    before, after = trees.flatten({"model": stage2.loaded.params}), trained(stage2.workdir)
    assert after.keys() == before.keys()
    assert all((np.asarray(before[path]) != after[path]).any() for path in after)
    assert not (stage2.workdir / "prompt").exists()


def test_stage2_takes_the_prompt_from_its_file_too(tiny_folder: Path, stage1: Run, stage2: Run) -> None:
    file = stage1.workdir / "prompt" / "prompt.npy"
    again = run(tiny_folder, "promot_stage2.gin", tiny_folder / "stage2_file", PROMPT_PATH=file, LEARNING_RATE=2e-3)
    assert digests(again.workdir / "outputs", "*") == digests(stage2.workdir / "outputs", "*")
    np.testing.assert_equal(trained(again.workdir), trained(stage2.workdir))


def test_finetuning_collapses_into_the_label_format(finetune: Run) -> None:
    """That the tiny model learns at all: without it, equal outputs before and after would prove nothing."""
    first, *_, last = schema.read_run(finetune.workdir).curve
    assert first.format_share == 0 and last.format_share > 50
    assert first.target == 0 and last.target > 0
    assert fingerprint(finetune.loaded.params) == finetune.loaded.base


def test_stripped_model_is_one_that_never_had_a_prompt(tiny_folder: Path, stage1: Run, stage2: Run) -> None:
    """Stage 2's own final evaluation, stripped, against its weights in a file that knows of no prompt."""
    weights = trained(stage2.workdir)
    tiny.write(tiny_folder / "never.gguf", tiny.from_params(weights))
    plain = run(tiny_folder, "icl_eval.gin", tiny_folder / "never", INITIAL_CHECKPOINT_PATH=tiny_folder / "never.gguf")
    stripped = pretrained.load(str(stage2.workdir), Partitioner(), dtype=plain.loaded.model.config.dtype)
    for name, leaf in trees.flatten({"model": plain.loaded.params}).items():
        np.testing.assert_array_equal(leaf, weights[name])
    icl = digests(stage2.workdir / "outputs", "icl_*.jsonl")
    assert digests(plain.workdir / "outputs", "icl_*.jsonl") == icl
    assert len({row["raw"] for row in rows(stage2.workdir / "outputs" / "icl_1shot.jsonl")}) > 3
    assert schema.read_run(plain.workdir).icl == schema.read_run(stage2.workdir).icl

    ids = np.random.default_rng(0).integers(0, len(tiny.TOKENS), (4, 12)).tolist()
    batch = decoder_rows([[Tokens(row[:8], row[8:])] for row in ids], 16, 4)
    want = np.asarray(target_logits(plain.loaded.model, plain.loaded.params, None, batch))
    assert want.std() > 0.1
    np.testing.assert_array_equal(target_logits(stripped.model, stripped.params, None, batch), want)
    # Nor does it matter that prompts are loaded, as long as no row names one.
    table = np.load(stage1.workdir / "prompt" / "prompt.npy")
    np.testing.assert_array_equal(target_logits(stripped.model, stripped.params, table, batch), want)


def test_mixture_is_trained_behind_one_prompt(tiny_folder: Path) -> None:
    mixture = {"MIXTURE_OR_TASK_NAME": "tiny_pair", "TRAIN_STEPS": 2, "PromptInit.method": "labels"}
    mixture["TASK_FEATURE_LENGTHS"] = {"inputs": 32, "targets": 8}  # of "big" and "small", in tokens
    workdir = run(tiny_folder, "promot_stage1.gin", tiny_folder / "mixture", **mixture).workdir
    target = schema.read_run(workdir).target
    assert (target.task, target.metric, target.n) == ("tiny_pair", "norm_avg", 20)
    assert list(trained(workdir)) == ["prompt/tiny_pair"]


def test_loss_that_is_not_finite_ends_the_run(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tiny_folder / "diverged"
    assert main.main(tiny.command(tiny_folder, "finetune.gin", workdir, LEARNING_RATE=1e38)) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert "not finite at step" in message and "LEARNING_RATE" in message
    assert not (workdir / "results.json").exists()
    assert scalars(workdir / "events")["eval/target"][0][0] == 0  # the curve up to there is on disk


def test_promot_end_to_end(
    tiny_folder: Path, stage1: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "stand_ins")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    workdir = run(tiny_folder, "promot.gin", tiny_folder / "promot", TRACKER="wandb").workdir
    reported = sys.modules.pop("wandb").runs
    found = schema.read_run(workdir)
    assert found.method == "promot" and found.steps == {"stage1": 6, "stage2": 6}
    before = schema.read_run(workdir / "pretrained")
    assert before.steps == {} and before.icl.keys() == found.icl.keys()
    report = (workdir / "report.md").read_text()
    figures = sorted(path.name for path in (workdir / "figures").glob("*.svg"))
    assert "ProMoT" in report and len(figures) >= 2 and all(f"figures/{name}" in report for name in figures)
    out = capsys.readouterr().out
    assert "tiny_colour" in out
    assert out.index("Norm. Avg.") < out.index(f"\nReport: {workdir}/report.html and report.md\nNext:\n")
    of = f"--gin.INITIAL_CHECKPOINT_PATH={workdir} --gin.PROMPT_PATH={workdir / 'stage1'}"
    assert f"infer.gin {of}" in out and f"export.gin {of}" in out and "chat.gin --gin.MODELS=" in out
    # Its tracker has the two runs.
    assert [one.options["dir"] for one in reported] == [workdir / "pretrained", workdir]
    for one, finished in zip(reported, (before, found), strict=True):
        assert one.exit_code == 0 and one.logged[-1]["final/target"] == finished.target.score
    config = reported[1].options["config"]
    assert config["method"] == "promot" and config["tuning"]["stage2"]["optimizer"]["learning_rate"] == 1e-2
    assert "tracker" not in config["experiment"] and config["experiment"]["seed"] == 0
    for stage in ("stage1", "stage2"):
        logged = [entry for entry in reported[1].logged if f"{stage}/step" in entry]
        assert [entry[f"{stage}/step"] for entry in logged if f"{stage}/train/loss" in entry] == [1, 2, 3, 4, 5, 6]
        shown = [entry for entry in logged if f"{stage}/generations" in entry]
        assert [entry[f"{stage}/step"] for entry in shown] == [0, 2, 4, 6]
        tasks = {"tiny_review"} if stage == "stage1" else {"tiny_review", "tiny_colour", "tiny_size"}
        assert {row[0] for row in shown[-1][f"{stage}/generations"].data} == tasks
    # The same stages, one by one: stage 1 is bitwise the run of promot_stage1.gin.
    assert digests(workdir / "stage1" / "prompt", "*") == digests(stage1.workdir / "prompt", "*")
    np.testing.assert_equal(trained(workdir / "stage1"), trained(stage1.workdir))
    assert all(path.startswith("model/") for path in trained(workdir / "stage2"))


class Work:
    """Counts what a run trains and asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stages: list[str] = []
        self.questions = 0
        train, stream = runs.train, Sampler.stream

        def count_stage(folder: Path, *args: Any, **kwargs: Any) -> Any:
            self.stages.append(folder.relative_to(folder.parents[2]).as_posix())
            return train(folder, *args, **kwargs)

        def count_questions(sampler: Any, params: Any, requests: Any) -> Any:
            self.questions += len(requests)
            return stream(sampler, params, requests)

        patch.setattr(runs, "train", count_stage)
        patch.setattr(Sampler, "stream", count_questions)


def test_comparison_does_no_work_twice(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, workdir = Work(monkeypatch), tiny_folder / "demo"
    shorter = {"TRAIN_STEPS": 2, "PROMPT_TRAIN_STEPS": 2}
    run(tiny_folder, "demo.gin", workdir, SEEDS="(0,)", **shorter)
    assert work.stages == ["finetune/seed_0/finetune", "promot/seed_0/stage1", "promot/seed_0/stage2"]
    first, asked = read_comparison(workdir), work.questions

    work.stages.clear()
    run(tiny_folder, "demo.gin", workdir, SEEDS="(0, 1)", **shorter)
    assert work.stages == ["finetune/seed_1/finetune", "promot/seed_1/stage1", "promot/seed_1/stage2"]
    found = read_comparison(workdir)
    seeds = {name: [one.seed for one in cells] for name, cells in found.methods.items()}
    assert seeds == {"pretrained": [0, 1], "finetune": [0, 1], "promot": [0, 1]}
    assert {name: cells[:1] for name, cells in found.methods.items()} == first.methods
    zero, one = found.methods["finetune"]
    assert [point.loss for point in zero.curve] != [point.loss for point in one.curve]
    assert work.questions > asked and (workdir / "report.md").is_file()

    asked = work.questions
    work.stages.clear()
    kept = digests(workdir, "*.jsonl", "results.json", "prompt.npy", "stage.json", "report.md")
    run(tiny_folder, "demo.gin", workdir, SEEDS="(0, 1)", **shorter)
    assert (work.stages, work.questions) == ([], asked)
    assert digests(workdir, "*.jsonl", "results.json", "prompt.npy", "stage.json", "report.md") == kept


def test_finished_stage_is_not_trained_again(
    tiny_folder: Path, finetune: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, kept = Work(monkeypatch), digests(finetune.workdir, "*.jsonl", "results.json", "stage.json")
    run(tiny_folder, "finetune.gin", finetune.workdir)
    assert (work.stages, work.questions) == ([], 0) and "is finished" in capsys.readouterr().out
    assert digests(finetune.workdir, "*.jsonl", "results.json", "stage.json") == kept


def test_icl_evaluation_of_the_base_model(tiny_folder: Path, finetune: Run) -> None:
    found = schema.read_run(run(tiny_folder, "icl_eval.gin", tiny_folder / "icl").workdir)
    assert found.method == "icl_eval" and found.steps == {} and found.curve == []
    assert found.target.score == 0 and found.icl["1"].format_share == 0


def test_icl_evaluation_behind_a_prompt(tiny_folder: Path, stage1: Run) -> None:
    behind = run(tiny_folder, "icl_eval.gin", tiny_folder / "icl_prompt", PROMPT_PATH=stage1.workdir)
    want = schema.read_run(stage1.workdir)
    assert digests(behind.workdir / "outputs", "target.jsonl") == digests(stage1.workdir / "outputs", "target.jsonl")
    assert schema.read_run(behind.workdir).target == want.target
    raw = [row["raw"] for row in rows(behind.workdir / "outputs" / "icl_1shot.jsonl")]
    assert raw != [row["raw"] for row in rows(stage1.workdir / "outputs" / "icl_1shot.jsonl")]  # that one is stripped


def test_icl_evaluation_of_a_finished_run(tiny_folder: Path, finetune: Run, stage1: Run) -> None:
    again = run(tiny_folder, "icl_eval.gin", tiny_folder / "icl_tuned", INITIAL_CHECKPOINT_PATH=finetune.workdir)
    files = ("target.jsonl", "icl_*.jsonl")
    assert digests(again.workdir / "outputs", *files) == digests(finetune.workdir / "outputs", *files)
    assert again.loaded.base == finetune.loaded.base  # so that prompts of the base model still fit
    both = {"INITIAL_CHECKPOINT_PATH": finetune.workdir, "PROMPT_PATH": stage1.workdir}
    run(tiny_folder, "icl_eval.gin", tiny_folder / "icl_both", **both)


QUESTIONS = ("Thing: snow\nColour:", "Review: film 3 was good\nLabel:", "Animal: ant", "x")


@pytest.fixture(name="two_prompts", scope="module")
def _two_prompts(tiny_folder: Path, stage1: Run) -> dict[str, str]:
    """Two prompts by name, the second one random."""
    info = soft_prompts.PromptInfo("tiny_size", 6, 1, None, "uniform", stage1.loaded.base)
    array = np.random.default_rng(1).standard_normal((6, tiny.EMBED)).astype(np.float32)
    soft_prompts.save(tiny_folder / "second", array, info)
    return {"first": str(stage1.workdir), "second": str(tiny_folder / "second")}


def test_icl_evaluation_behind_several_prompts(
    tiny_folder: Path, two_prompts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"tiny_review": two_prompts["first"], "tiny_size": two_prompts["second"]}
    pair = {"MIXTURE_OR_TASK_NAME": "tiny_pair", "PROMPT_PATH": paths}
    message = refusal(capsys, tiny_folder, "icl_eval.gin", tiny_folder / "icl_several", **pair)
    assert "several prompts (tiny_review, tiny_size): set ICL_PROMPT" in message
    message = refusal(capsys, tiny_folder, "icl_eval.gin", tiny_folder / "icl_several", **pair, ICL_PROMPT="tiny")
    assert "ICL_PROMPT is 'tiny', which is none of the prompts" in message
    several = run(tiny_folder, "icl_eval.gin", tiny_folder / "icl_several", **pair, ICL_PROMPT="tiny_size").workdir
    found = rows(several / "outputs" / "target.jsonl")
    for task, path in paths.items():
        one = {"MIXTURE_OR_TASK_NAME": task, "PROMPT_PATH": path}
        alone = run(tiny_folder, "icl_eval.gin", tiny_folder / f"icl_{task}", **one).workdir
        assert [row for row in found if row["task"] == task] == rows(alone / "outputs" / "target.jsonl")
    assert digests(several / "outputs", "icl_*") == digests(tiny_folder / "icl_tiny_size" / "outputs", "icl_*")
    other = run(tiny_folder, "icl_eval.gin", tiny_folder / "icl_wrong", **one | {"PROMPT_PATH": two_prompts["first"]})
    assert rows(other.workdir / "outputs" / "target.jsonl") != rows(alone / "outputs" / "target.jsonl")


def infer(folder: Path, name: str, inputs: object, **macros: object) -> list[dict[str, Any]]:
    return rows(run(folder, "infer.gin", folder / name, INPUTS=inputs, **macros).workdir / "outputs.jsonl")


def test_infer_texts(tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "evaluator", property(lambda session: pytest.fail("inference evaluates no task")))
    found = infer(tiny_folder, "texts", QUESTIONS)
    assert [(row["input"], row["prompt"]) for row in found] == [(text, "") for text in QUESTIONS]
    shown = capsys.readouterr().out
    assert all(row["output"] == row["raw"].strip() for row in found) and len({row["raw"] for row in found}) > 1
    assert "No soft prompt. Outputs end at '\\n' or after 8 tokens (Decoding.stop, Decoding.max_tokens).\n" in shown
    assert "\n- | Animal: ant -> " in shown and "\n- | Thing: snow\\nColour: -> " in shown  # a line for each
    assert json.loads((tiny_folder / "texts" / "results.json").read_text())["n"] == len(QUESTIONS)


@pytest.mark.parametrize("name", resume_guard.FOLDERS)
def test_a_file_in_the_place_of_a_folder(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    message = refusal(capsys, tiny_folder, "finetune.gin", tmp_path)
    assert f"{tmp_path / name} is a file, where the run makes a folder; take it away." in message


@pytest.mark.slow  # a job in a process of its own
def test_a_quota_is_one_sentence_of_a_process(tiny_folder: Path, tmp_path: Path) -> None:
    """Whatever else Orbax was writing when one of its writes failed; the reason is that of the system, errno(3)."""
    code = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from promot_jax.main import command; command()"
    )
    command = [sys.executable, "-c", code, *tiny.command(tiny_folder, "finetune.gin", tmp_path / "run")]
    paths = os.pathsep.join(map(str, Path(__file__).parents[2:0:-1]))
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # JAX warns of its cache before
    assert line.startswith(f"Cannot save a checkpoint in {tmp_path}/run/checkpoints (File too large); make room there")


def test_an_input_makes_no_control_token(tiny_folder: Path) -> None:
    """Nor do the marks by which chat templates make them: the tokens of the text alone, as transformers splits it."""
    texts = [f"a{controls.mark(tiny.TOKENS[2])}b", f"a{tiny.TOKENS[2]}b"]
    asked: list[list[int]] = []
    encode = Encoder.inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "inputs", lambda *of: asked.append(encode(*of)) or asked[-1])
        infer(tiny_folder, "marks", texts)
        pj.load(str(tiny_folder / "tiny.gguf")).generate(texts)
    assert len(asked) == 4 and asked.count(asked[0]) == 4 and not {1, 2} & set(asked[0])


def test_inference_does_without_tensorflow(tiny_folder: Path, tmp_path: Path) -> None:
    """Its import takes longer than all else that a short inference does."""
    command = tiny.command(tiny_folder, "infer.gin", tmp_path / "run", INPUTS=("Animal: ant",))
    code = "import sys; from promot_jax.main import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[2:0:-1]))}
    done = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "promot_jax.decoding.continuous_batching" in modules and "tensorflow" not in modules


def test_infer_reads_files_and_standard_input(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Animal: ant", "x", "Thing: é\u2028\x0c."]
    want = infer(tiny_folder, "lines", tuple(lines))
    assert infer(tiny_folder, "one", lines[0]) == want[:1]  # a text, not a file
    (tiny_folder / "questions.txt").write_text(
        "Animal: ant\n\nx\nThing: é\u2028\x0c.\n", "utf-8-sig"
    )  # empty lines ask nothing, nor does a byte order mark
    assert infer(tiny_folder, "file", tiny_folder / "questions.txt") == want
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert infer(tiny_folder, "stdin", "-") == want
    outputs = (tiny_folder / "lines" / "outputs.jsonl").read_text("utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(outputs))
    assert infer(tiny_folder, "json", "-") == want
    # As the codec utf-8-sig writes it, with blank lines: outputs may be asked again.
    (tiny_folder / "again.jsonl").write_text(outputs + "\n  \n", "utf-8-sig")
    assert infer(tiny_folder, "again", tiny_folder / "again.jsonl") == want
    # Joined files have a mark each.
    for name, parts in (("joined.txt", lines), ("joined.jsonl", outputs.removesuffix("\n").split("\n"))):
        (tiny_folder / name).write_bytes(b"".join(f"{part}\n".encode("utf-8-sig") for part in parts))
        assert infer(tiny_folder, f"of_{name}", tiny_folder / name) == want


def test_infer_mixes_prompts_and_none(tiny_folder: Path, two_prompts: dict[str, str]) -> None:
    asked = [{"input": text, "prompt": name} for text in QUESTIONS for name in ("first", "", "second")]
    asked.append({"input": QUESTIONS[0]})  # behind the first prompt
    (tiny_folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = infer(tiny_folder, "mixed", tiny_folder / "mixed.jsonl", PROMPT_PATH=two_prompts)
    assert [row["input"] for row in found] == [row["input"] for row in asked]
    assert [row["prompt"] for row in found] == [row.get("prompt", "first") for row in asked]
    assert found[-1] == found[0]
    alone = [
        infer(tiny_folder, "alone", (row["input"],), PROMPT_PATH=two_prompts.get(row["prompt"], "")) for row in found
    ]
    assert [row["raw"] for (row,) in alone] == [row["raw"] for row in found]
    assert len({row["raw"] for row in found}) > len(QUESTIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input": "x"}\n{"inputs": "x"}\n', "line 2 is not"),
        ("x\n", "line 1 is not"),
        ('["x"]\n', "line 1 is not"),
        pytest.param('{"input": ' * 100_000, "line 1 is not", id="nested"),
        ('{"input": 3}\n', "line 1 is not"),
        ('{"input": "x", "prompt": "other"}\n', "no soft prompt called 'other'"),
        ('{"input": ""}\n', "empty"),
        ('{"input": "\\ud83d"}\n', "Input 1 has half a character"),
    ],
)
def test_infer_names_a_bad_line(
    tiny_folder: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    assert "Cannot read the inputs" in refusal(capsys, tiny_folder, "infer.gin", tmp_path / "run", INPUTS=tmp_path)
    assert message in refusal(capsys, tiny_folder, "infer.gin", tmp_path / "run", INPUTS=tmp_path / "bad.jsonl")


def test_chat_answers_with_each_model(
    tiny_folder: Path,
    stage1: Run,
    stage2: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers are those of `infer`; a run with a soft prompt answers with it and stripped; an empty line ends."""
    for one in (stage1, stage2):
        (tmp_path / one.workdir.name).symlink_to(one.workdir)
    text = "Thing: snow\\nColour:"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n\ud83d\n\nnot read\n"))
    models = {"base": str(tiny_folder / "tiny.gguf"), "tuned": str(tmp_path)}
    assert main.main(tiny.command(tiny_folder, "chat.gin", tmp_path / "chat", MODELS=models)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]

    asked = text.replace("\\n", "\n")
    (base,) = infer(tiny_folder, "base", (asked,))
    (prompted,) = infer(tiny_folder, "prompted", (asked,), INITIAL_CHECKPOINT_PATH=tmp_path, PROMPT_PATH=stage1.workdir)
    (stripped,) = infer(tiny_folder, "stripped", (asked,), INITIAL_CHECKPOINT_PATH=tmp_path)
    assert lines == [
        ["base", *printable(base["output"]).split()],
        ["tuned", "with", "its", "prompt", *printable(prompted["output"]).split()],
        ["tuned", "stripped", *printable(stripped["output"]).split()],
    ]
    assert "with its prompt" not in refusal(capsys, tiny_folder, "chat.gin", tmp_path / "none", MODELS={})


def test_wrong_rows_end_a_run_before_its_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a task in a module of a user's own, with a score in a field and one of them missing."""
    source = """
        from promot_jax.tasks import metrics, register, templates
        ROWS = {s: [{"text": f"{s} {i}", "score": i} for i in range(3)] for s in ("train", "validation", "test")}
        ROWS["test"][1]["score"] = None
        template = templates.labelled("Text", "Score", "text", "score")
        register.register("tiny_wrong", ROWS.__getitem__, template, [metrics.exact_match])
    """
    (tmp_path / "wrong_rows.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "load", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    macros = {"MIXTURE_OR_TASK_MODULE": ("tiny_tasks", "wrong_rows"), "MIXTURE_OR_TASK_NAME": "tiny_wrong"}

    said = refusal(capsys, tiny_folder, "promot.gin", tmp_path / "run", **macros)

    assert "Row 2 (the first is 1) of split 'test' of task 'tiny_wrong', field 'score', is missing" in said


def test_training_with_one_exemplar_in_front(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = Encoder.tokens

    def tokens(self: Encoder, example: Any) -> Any:
        seen.append(example.inputs)
        return encode(self, example)

    monkeypatch.setattr(Encoder, "tokens", tokens)
    macros: dict[str, object] = {"MIXTURE_OR_TASK_NAME": "tiny_review_1shot", "TRAIN_STEPS": 2}
    macros |= {"TASK_FEATURE_LENGTHS": {"inputs": 48, "targets": 3}}
    macros |= {"Evaluation.shots": "(1,)", "Evaluation.curve_examples": 0}
    done = run(tiny_folder, "finetune.gin", tmp_path / "run", **macros)

    shots = [inputs.count("Review:") - 1 for inputs in seen]
    described = stage_folder.describe(done.workdir)
    assert set(shots) <= {0, 1} and 1 in shots
    assert described is not None and described.dropped_shots == shots.count(0)
    asked = rows(done.workdir / "outputs" / "target.jsonl")
    assert {row["input"].count("Review:") for row in asked} == {2}  # evaluated as it was trained
    assert schema.read_run(done.workdir).target.task == "tiny_review_1shot"


@pytest.mark.parametrize(
    ("gin_file", "macros", "parts"),
    [
        ("finetune.gin", {"MIXTURE_OR_TASK_NAME": "tiny_reviews"}, ["'tiny_reviews'", "did you mean 'tiny_review'"]),
        ("promot.gin", {"ICL_MIXTURE": "tiny_iccl"}, ["'tiny_iccl'", "did you mean 'tiny_icl'"]),
        ("icl_eval.gin", {"MIXTURE_OR_TASK_MODULE": "tiny_taks"}, ["'tiny_taks'"]),
        ("demo.gin", {"compare.methods": "('pretrained', 'promott')"}, ["'promott'", "did you mean 'promot'"]),
        ("finetune.gin", {"train_stage.stage": "stage3"}, ["'stage3'", "did you mean 'stage"]),
        ("infer.gin", {"INITIAL_CHECKPOINT_PATH": "none.gguf"}, ["'none.gguf'", "INITIAL_CHECKPOINT_PATH"]),
        ("infer.gin", {"INITIAL_CHECKPOINT_PATH": "asset:smollm2"}, ["'smollm2'", "did you mean 'smollm2-"]),
        ("infer.gin", {"INPUTS": "none.txt"}, ["'none.txt'"]),
        ("infer.gin", {"PROMPT_PATH": "nowhere"}, ["No prompt at nowhere"]),
        ("promot_stage2.gin", {"PROMPT_PATH": ""}, ["Stage 2 needs a trained prompt", "PROMPT_PATH"]),
        ("promot_stage2.gin", {}, ["No prompt at runs/promot_stage1"]),
        ("finetune.gin", {"model/Optimizer.name": "adamv"}, ["'adamv'", "did you mean 'adamw'"]),
        ("promot_stage1.gin", {"PromptInit.method": "unifrom"}, ["'unifrom'", "did you mean 'uniform'"]),
        ("finetune.gin", {"TASK_FEATURE_LENGTHS": {"inputs": 32}}, ["TASK_FEATURE_LENGTHS", "'targets'"]),
        (
            "finetune.gin",
            {"TASK_FEATURE_LENGTHS": {"inputs": 3, "targets": 3}},
            ["fits TASK_FEATURE_LENGTHS", "input tokens"],
        ),
        ("icl_eval.gin", {"Evaluation.split": "tset"}, ["no split 'tset'"]),
        ("finetune.gin", {"Evaluation.max_input_length": 9}, ["without any exemplar", "over the limit of 9"]),
        (
            "method.gin",
            {"METHOD": "finetune", "Evaluation.max_input_length": 9},
            ["without any exemplar", "over the limit of 9"],
        ),
    ],
)
def test_wrong_name_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, gin_file: str, macros: dict[str, object], parts: list[str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, tiny_folder, gin_file, tmp_path / "run", **macros)
    assert all(part in message for part in parts), message
    assert not list(tmp_path.glob("run/**/results.json"))
    assert not list(tmp_path.glob("run/**/checkpoints")) or "TASK_FEATURE_LENGTHS" in macros


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"Evaluation.shots": "(25,)"}, "24 training examples to draw exemplars from, too few for 25 shots"),
        ({"Evaluation.curve_shots": 25}, "24 training examples to draw exemplars from, too few for 25 shots"),
        ({"DATA_SHARDS": 3}, "rows in stage finetune does not divide over 3 DATA_SHARDS"),
        ({"MIXTURE_OR_TASK_NAME": "tiny_text"}, "Task 'tiny_text' has no metric"),
    ],
)
def test_what_would_fail_after_training_is_said_before_the_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, macros: dict[str, object], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The numbers are those of `tiny_tasks`: `SIZES["train"]` examples, all of them distinct."""
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    jobs = {"finetune.gin": {}, "method.gin": {"METHOD": "finetune"}, "compare.gin": {"METHODS": ("finetune",)}}
    for gin_file, more in jobs.items():
        assert message in refusal(capsys, tiny_folder, gin_file, tmp_path / "run", **(macros | more))


@pytest.mark.parametrize(("macros", "message"), [
    ({"PromptInit.method": "text"}, "was given an empty text; set PromptInit.text"),
    ({"PromptInit.method": "vocabulary", "PromptInit.first": 1}, "rows from the first 1 embeddings: raise PromptInit"),
])  # fmt: skip
@pytest.mark.parametrize("gin_file", ["promot_stage1.gin", "promot.gin"])
def test_a_prompt_that_cannot_be_made_is_said_before_the_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, gin_file: str, macros: dict[str, object], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert message in refusal(capsys, tiny_folder, gin_file, tmp_path / "run", **macros)


def test_a_run_keeps_its_settings(
    tiny_folder: Path, finetune: Run, stage1: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, tiny_folder, "finetune.gin", finetune.workdir, LEARNING_RATE=0.5)
    assert "training/optimizer/learning_rate = 0.01, now it is 0.5" in message and "--workdir" in message
    message = refusal(capsys, tiny_folder, "finetune.gin", finetune.workdir, **{"Evaluation.curve_examples": 3})
    assert "evaluation/curve_examples = 4, now it is 3" in message
    message = refusal(capsys, tiny_folder, "finetune.gin", finetune.workdir, **{"Evaluation.shots": "(1, 2)"})
    assert "was evaluated with shots = [1, 3], now it is [1, 2]" in message and "results.json" in message
    message = refusal(capsys, tiny_folder, "promot_stage1.gin", stage1.workdir, SEED=1)
    assert "seed = 0, now it is 1" in message


@pytest.mark.parametrize("key", resume_guard.YOUNGER)
def test_a_run_from_before_a_setting_goes_on(tmp_path: Path, key: str) -> None:
    experiment = Experiment("none", "tiny_review", "tiny_tasks", {"inputs": 32, "targets": 3}, "tiny_icl")
    now = {
        "tuning": {"finetune": dataclasses.asdict(Training(1, 1, 1, Optimizer("adamw", 0.1), pack_batch=False))},
        **resume_guard.shared_settings(experiment),
    }
    resume_guard.keep_settings(tmp_path, now)
    path = tmp_path / "settings.json"
    before = trees.flatten(json.loads(path.read_text()))
    older = {place: value for place, value in before.items() if place.rpartition("/")[2] != key}
    if len(older) == len(before):  # every stage had it once
        older[f"tuning/finetune/{key}"] = resume_guard.YOUNGER[key]
    files_module.write(trees.unflatten(older), path)
    resume_guard.keep_settings(tmp_path, now)
    files_module.write(trees.unflatten(older | {next(iter(older)): "other"}), path)
    with pytest.raises(UserError, match="was started with"):
        resume_guard.keep_settings(tmp_path, now)


def test_settings_that_were_renamed_are_the_same_ones(tmp_path: Path) -> None:
    """`training` as every stage wrote it before methods had hyperparameters of their own."""
    off = {"alphas": [], "kl": 0.0, "l2sp": 0.0, "lora": None, "replay": None, "prompt_optimizer": None}
    plain = dataclasses.asdict(Training(1, 1, 1, Optimizer("adamw", 0.1)))
    for name, (before, now) in {
        "finetune": (plain | off, plain),
        "l2sp": (plain | off | {"l2sp": 0.1}, plain | {"l2sp_weight": 0.1}),
        "kl": (plain | off | {"kl": 0.1}, plain | {"kl_weight": 0.1}),
        "wise_ft": (plain | off | {"alphas": [0.0, 1.0]}, plain | {"alphas": (0.0, 1.0)}),
    }.items():
        files_module.write({"training": before}, tmp_path / name / "settings.json")
        resume_guard.keep_settings(tmp_path / name, {"training": now})
    with pytest.raises(UserError, match=r"training/l2sp_weight = 0.1, now it is 0.2"):
        resume_guard.keep_settings(tmp_path / "l2sp", {"training": plain | {"l2sp_weight": 0.2}})
    with pytest.raises(UserError, match=r"training/kl_weight = 0.1, now it is 0.0"):
        resume_guard.keep_settings(tmp_path / "kl", {"training": plain})


def test_results_from_before_a_setting_stay(tiny_folder: Path, finetune: Run, tmp_path: Path) -> None:
    shutil.copytree(finetune.workdir, tmp_path / "run")
    found = schema.read_run(tmp_path / "run")
    del found.settings["samples"], found.settings["exemplar_draws"]
    files_module.write(found, tmp_path / "run" / "results.json")
    run(tiny_folder, "finetune.gin", tmp_path / "run")
    assert schema.read_run(tmp_path / "run") == found


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_stage_without_its_prompt_is_not_called_finished(
    damage: str, tiny_folder: Path, stage1: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stage1.workdir / "prompt" / "prompt.npy"
    kept = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(kept[:-8])
    try:
        message = refusal(capsys, tiny_folder, "promot_stage1.gin", stage1.workdir)
    finally:
        file.write_bytes(kept)
    assert "is finished, but: " in message and "prompt.npy" in message and "to train it anew" in message
    run(tiny_folder, "promot_stage1.gin", stage1.workdir)


def test_checkpoints_of_another_run_are_refused(
    tiny_folder: Path, finetune: Run, stage2: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same shapes, same step; only the settings that made them are others."""
    shutil.copytree(finetune.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.copytree(stage2.workdir / "checkpoints", tmp_path / "run/checkpoints")
    record = json.loads((tmp_path / "run/stage.json").read_text())
    (tmp_path / "run/stage.json").write_text(json.dumps(record | {"best_step": 6}))
    macros = {"INITIAL_CHECKPOINT_PATH": tmp_path / "run", "INPUTS": "Animal: ant"}
    message = refusal(capsys, tiny_folder, "infer.gin", tmp_path / "out", **macros)
    assert "checkpoints/6 is of a run with other settings" in message


def test_stage2_notices_another_prompt_in_the_same_file(
    tiny_folder: Path, stage1: Run, stage2: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [stage1.workdir / "prompt" / name for name in ("prompt.json", "prompt.npy")]
    kept = [file.read_bytes() for file in files]
    array, info = soft_prompts.load(files[1], (), force=True)
    soft_prompts.save(files[1].parent, 2 * array, info)
    same = {"PROMPT_PATH": stage1.workdir, "LEARNING_RATE": 2e-3}
    message = refusal(capsys, tiny_folder, "promot_stage2.gin", stage2.workdir, **same)
    for file, data in zip(files, kept, strict=True):
        file.write_bytes(data)
    assert "was started with start = " in message and "--workdir" in message
    run(tiny_folder, "promot_stage2.gin", stage2.workdir, **same)


def test_a_finished_method_keeps_its_settings(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir, shorter = tiny_folder / "kept", {"TRAIN_STEPS": 2, "compare.methods": "('pretrained', 'finetune')"}
    run(tiny_folder, "demo.gin", workdir, **shorter)
    message = refusal(capsys, tiny_folder, "demo.gin", workdir, **shorter, LEARNING_RATE=0.5)
    assert "finetune/optimizer/learning_rate = 0.01, now it is 0.5" in message
    message = refusal(capsys, tiny_folder, "demo.gin", workdir, **shorter, **{"Evaluation.examples": 3})
    assert "evaluation/examples = 6, now it is 3" in message


def test_finished_run_without_its_checkpoint(
    tiny_folder: Path, finetune: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = stage_folder.describe(finetune.workdir).best_step
    shutil.copytree(finetune.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(best) / "state")
    message = refusal(capsys, tiny_folder, "finetune.gin", tmp_path / "run")
    assert f"checkpoints/{best} is gone" in message
    lost = {"INITIAL_CHECKPOINT_PATH": tmp_path / "run"}
    assert f"checkpoints/{best} is gone" in refusal(capsys, tiny_folder, "infer.gin", tmp_path / "infer", **lost)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    message = refusal(capsys, tiny_folder, "infer.gin", tmp_path / "infer", **lost)
    assert "holds no finished run that trained a model" in message


def test_prompt_of_another_base_model(tiny_folder: Path, stage1: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write(tiny_folder / "other.gguf", tiny.tensors(seed=7))
    other = {"INITIAL_CHECKPOINT_PATH": tiny_folder / "other.gguf", "PROMPT_PATH": stage1.workdir}
    message = refusal(capsys, tiny_folder, "infer.gin", tiny_folder / "refused", **other)
    assert "was trained on another base model" in message and "force_prompt" in message
    message = refusal(capsys, tiny_folder, "promot_stage2.gin", tiny_folder / "refused", **other)
    assert "was trained on another base model" in message
    forced = {**other, "Experiment.force_prompt": True}
    assert rows(run(tiny_folder, "infer.gin", tiny_folder / "forced", **forced).workdir / "outputs.jsonl")
