"""Every method and baseline end to end on the tiny model: which leaves move, what is stripped, what is reused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import main, methods, trees
from promot_jax.analysis.trained_stage import open_stage
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.config import binding, gin_files
from promot_jax.data.examples import import_tasks, task_names
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments import initial_params, session
from promot_jax.experiments import method as method_module
from promot_jax.experiments.initial_params import prompts_of_tasks
from promot_jax.experiments.method import run_method
from promot_jax.experiments.train_stream import train_batches
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import soft_prompts
from promot_jax.results import schema
from promot_jax.results.comparison import comparison
from promot_jax.results.records import replace

SHORT = {"TRAIN_STEPS": 2, "PROMPT_TRAIN_STEPS": 2, "Evaluation.shots": "(1,)", "Evaluation.examples": 2}
SHORT |= {"Evaluation.target_examples": 2, "Evaluation.curve_examples": 2, "Evaluation.curve_target_examples": 2}
SHORT |= {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 8}}
# Where a method's own settings do not fit the tiny model and tasks.
OWN = {
    "replay": {"REPLAY_TASK": "tiny_text", "REPLAY_RATE": 0.5, "REPLAY_TARGETS": 5},
    "freeze": {"FREEZE": 1},
    "promot_stm": {"STM_PERPLEXITY": 1e6},
    "wise_ft": {"ALPHAS": "(0.0, 0.5, 1.0)"},
    "multitask_finetune": {"MIXTURE_OR_TASK_NAME": "tiny_pair"},
    "multitask_promot": {"MIXTURE_OR_TASK_NAME": "tiny_pair"},
}


def bound(folder: Path, method: str, **macros: object) -> dict[str, Any]:
    """The arguments that `method.gin` gives to its job for a method on the tiny model."""
    paths = (gin_files.folder() / "method.gin", folder / "tiny.gin")
    chosen: dict[str, object] = {"METHOD": method} | SHORT | OWN.get(method, {}) | macros
    job = binding.bind(main.CONFIGURABLES, paths, [(name, str(value)) for name, value in chosen.items()])
    assert job.func.__name__ == "train_method"
    return dict(job.keywords)


@dataclasses.dataclass
class Done:
    """A finished run of a method: its results, its folder, and the parameters at the start and end of each stage."""

    run: dict[str, Any]
    folder: Path
    base: dict[str, np.ndarray]
    stages: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


def host(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in trees.flatten(tree).items()}


@pytest.fixture(name="opened", scope="module")
def _opened(tiny_folder: Path) -> session.Session:
    return session.open_session(bound(tiny_folder, "pretrained")["experiment"])


@pytest.fixture(name="finished", scope="module")
def _finished(tiny_folder: Path, opened: session.Session) -> Any:
    """Runs each method once."""
    done: dict[str, Done] = {}

    def finished(method: str) -> Done:
        if method not in done:
            arguments = bound(tiny_folder, method)
            own = session.with_experiment(opened, arguments["experiment"])
            seen: dict[str, Any] = {}
            run_stage = method_module.run_stage

            def watched(at: Any, folder: Path, stage: Any, training: Any, params: Any, run: Any) -> Any:
                after = run_stage(at, folder, stage, training, params, run)
                seen[folder.relative_to(tiny_folder / method).as_posix()] = (host(params), host(after))
                return after

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(method_module, "run_stage", watched)
                run = run_method(own, tiny_folder / method, arguments["method"], arguments["tuning"])
            done[method] = Done(run, tiny_folder / method, host({"model": opened.base.params}), seen)
        return done[method]

    return finished


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {path for path, leaf in after.items() if path not in before or leaf.tobytes() != before[path].tobytes()}


# One run of each kind: token weights differ in their loss alone (test_token_weights.py), texts in their words,
# `attention_only`, `lora_all` and `gate_up_only` in what they train (test_what_is_trained.py).
LIKE_OTHERS = {"dft", "eaft", "talr", "stm", "asft", "promot_dft", "promot_eaft", "promot_talr", "promot_asft"}
LIKE_OTHERS |= {"flow", "attention_only"}
LIKE_OTHERS |= {"hard_prompt", "hard_prompt_long", "lora_all", "gate_up_only", "promot_lora_r2", "promot_lora_r4"}
METHODS = [name for name in methods.METHODS if name not in LIKE_OTHERS]


@pytest.mark.parametrize("method", ["hard_prompt", "hard_prompt_long", "hard_prompt_labels", "promot_text"])
def test_a_prompt_of_text_is_the_text(opened: session.Session, method: str) -> None:
    """Before any update the model with the prompt is the base model that reads the text's tokens, bitwise."""
    stage = methods.METHODS[method]().stages[0]
    (rows,) = initial_params.start(opened, [stage])["prompt"].values()
    text = stage.prompt_text.replace("{labels}", "good, bad")
    words, model = opened.base.vocabulary.encode(text), opened.base.model
    assert len(rows) == len(words) > 0 and stage.fixed_prompt == ("" if method == "promot_text" else "text")
    inputs, targets = opened.base.vocabulary.encode("a good film answer:"), [5, 6]
    virtual = range(model.config.vocab_size, model.config.vocab_size + len(words))
    logits = [
        target_logits(model, opened.base.params, table, model.layout([[Tokens([*ids, *inputs], targets)]], 400, 2))
        for ids, table in ((virtual, rows), (words, None))
    ]
    np.testing.assert_array_equal(*logits)


def test_labels_of_a_task_without_any_are_refused(opened: session.Session) -> None:
    stage, open_task = methods.METHODS["hard_prompt_labels"]().stages[0], "tiny_text"
    other = session.with_experiment(opened, dataclasses.replace(opened.experiment, task=open_task))
    with pytest.raises(UserError, match="names the labels of tiny_text, which has none"):
        initial_params.start(other, [stage])


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_moves_what_it_trains_and_nothing_else(finished: Any, method: str) -> None:
    done = finished(method)
    plan = methods.METHODS[method]().stages
    names = {name.split("/")[0] for name in done.stages}
    assert names == {stage.name for stage in plan} and done.run.method == method
    for name, (before, after) in done.stages.items():
        (stage,) = [stage for stage in plan if stage.name == name.split("/")[0]]
        subtrees = {"model", *["prompt"] * stage.prompt, *["lora"] * bool(stage.lora)}
        assert {path.split("/")[0] for path in after} == subtrees
        wanted = {path for path in after if path.startswith(stage.trains)}
        if method == "freeze":
            wanted.remove("model/token_embedder/embedding")
        if method == "value_only":
            wanted = {"model/decoder/layers/self_attention/value/kernel"}
        if stage.candidates:  # alpha 1, or between
            assert moved(before, after) <= wanted
            continue
        assert moved(before, after) == wanted, name
        saved = Checkpoints(done.folder / name / "checkpoints").shapes(done.run.best_step[name])
        assert set(saved) == wanted
    assert done.run.steps.keys() == done.stages.keys()
    assert all(done.run.target.n and entry.norm_avg is not None for entry in done.run.icl.values())


TAKEN_AWAY = [name for name in METHODS if any(stage.prompt or stage.lora for stage in methods.METHODS[name]().stages)]


@pytest.mark.parametrize("method", TAKEN_AWAY)
def test_in_context_the_model_is_plain(tiny_folder: Path, opened: session.Session, finished: Any, method: str) -> None:
    """The closing ICL outputs against those of the weights alone, which know of no prompt and no LoRA."""
    done = finished(method)
    if methods.METHODS[method]().stages[-1].tunes_model:
        plain = pretrained.load(str(done.folder), Partitioner())
        assert set(trees.flatten({"model": plain.params})) == set(done.base)
        assert plain.fingerprint != plain.base == opened.base.base
        params = plain.params
    else:
        params = opened.base.params
    settings = opened.evaluator
    entry, rows = settings.icl({"model": params}, 1, "test", 2)
    kept = [json.loads(line) for line in (done.folder / "outputs" / "icl_1shot.jsonl").read_text().splitlines()]
    assert [row.raw for row in rows] == [row["raw"] for row in kept]
    # The run leaves out the format share of tasks that share labels with its own; this evaluator has another task.
    shares = [
        {task: replace(one, format_share=None) for task, one in each.tasks.items()}
        for each in (entry, done.run.icl["1"])
    ]
    assert shares[0] == shares[1] and entry.norm_avg == done.run.icl["1"].norm_avg


def test_the_random_prompt_stays_as_it_was_drawn(finished: Any) -> None:
    done = finished("random_prompt")
    before, after = done.stages["random_prompt"]
    saved, info = soft_prompts.load(done.folder / "random_prompt", (), force=True)
    rows = before["prompt/tiny_review"]
    np.testing.assert_array_equal(rows, after["prompt/tiny_review"])
    np.testing.assert_array_equal(rows, saved)
    assert (info.initialiser, info.step) == ("uniform", 0)
    assert rows.min() < -0.25 and rows.max() > 0.25 and np.abs(rows).max() <= 0.5
    assert not np.isin(rows, done.base["model/token_embedder/embedding"]).any()  # not the vocabulary, as prompts start


def test_the_joint_prompt_and_loras_first_stage_are_handed_over(finished: Any) -> None:
    joint, lora = finished("joint"), finished("promot_lora")
    saved, info = soft_prompts.load(joint.folder / "joint", (), force=True)
    np.testing.assert_array_equal(saved, joint.stages["joint"][1]["prompt/tiny_review"])
    assert info.step == joint.run.best_step["joint"]
    first, second = lora.stages["stage1_lora"], lora.stages["stage2_lora"]
    assert not moved(first[1], second[0])
    assert not moved(
        {p: a for p, a in first[1].items() if p.startswith("lora/")},
        {p: a for p, a in second[1].items() if p.startswith("lora/")},
    )


def test_a_lora_run_is_loaded_with_lora_in_its_kernels(finished: Any) -> None:
    done = finished("lora")
    loaded = host({"model": pretrained.load(str(done.folder), Partitioner()).params})
    _, after = done.stages["lora"]
    changed = moved(done.base, loaded)
    assert changed == {path for path in done.base if path.endswith(("query/kernel", "value/kernel"))}
    for path in changed:
        module = path.replace("model/", "lora/").removesuffix("kernel")
        update = 8.0 / 4 * after[module + "lora_a"] @ after[module + "lora_b"]
        np.testing.assert_allclose(loaded[path] - done.base[path], update, atol=1e-6)


def test_wise_ft_goes_from_the_base_to_the_fine_tuned_model(finished: Any, opened: session.Session) -> None:
    done, plain = finished("wise_ft"), finished("finetune")
    _, tuned = done.stages["finetune"]
    assert not moved(plain.stages["finetune"][1], tuned)
    points = done.run.curve
    assert [(point.step, point.alpha) for point in points] == [(0, 0.0), (50, 0.5), (100, 1.0)]
    assert {point.stage for point in points} == {"wise_ft"}
    first, last = plain.run.curve[0], plain.run.curve[-1]
    for key in ("target", "icl", "tasks", "format_share"):
        assert getattr(points[0], key) == getattr(first, key) and getattr(points[-1], key) == getattr(last, key)
    base, end = ({"model": opened.base.params}, trees.unflatten(tuned))
    for alpha, want in ((0, base), (1, end), (0.0, base), (1.0, end)):
        assert not moved(host(want), host(trees.interpolate(base, end, alpha)))
    middle = host(trees.interpolate(base, end, 0.25))
    for path, leaf in middle.items():
        np.testing.assert_allclose(leaf, 0.75 * done.base[path] + 0.25 * tuned[path], rtol=1e-5, atol=1e-6)
    loaded = pretrained.load(str(done.folder), Partitioner())
    alpha = done.run.best_step["wise_ft"] / 100
    assert not moved(host(trees.interpolate(base, end, alpha)), host({"model": loaded.params}))


def test_baselines_take_part_in_the_comparison_at_matched_score(finished: Any) -> None:
    made = comparison([finished(name).run for name in ("pretrained", "finetune", "promot", "wise_ft", "lora")])
    for name in ("finetune", "promot", "wise_ft", "lora"):
        (run,) = made.methods[name]
        assert run.matched.step > 0 and run.matched.icl["1"].tasks
        begun = next(point for point in run.curve if point.stage in methods.model_tuning() and not point.step)
        before = made.methods["pretrained"][0].matched  # the same, whichever method it is taken from
        assert begun.tasks == before.icl["1"].tasks
        assert not methods.is_plain(name) or begun.target == before.target.score


def test_frozen_layer_of_the_method(finished: Any) -> None:
    before, after = finished("freeze").stages["freeze"]
    for path in before:
        if "/layers/" in path:
            assert before[path][0].tobytes() == after[path][0].tobytes() and (before[path][1] != after[path][1]).any()


# ---- several tasks ---------------------------------------------------------------------------------------------------


def test_each_task_has_a_prompt_of_its_own_trained_on_it_alone(finished: Any) -> None:
    done, alone = finished("multitask_promot"), finished("prompt_tuning")
    assert list(done.stages) == ["stage1/tiny_review", "stage1/tiny_size", "stage2"]
    for task in ("tiny_review", "tiny_size"):
        trained = done.stages[f"stage1/{task}"][1][f"prompt/{task}"]
        np.testing.assert_array_equal(trained, done.stages["stage2"][0][f"prompt/{task}"])
        np.testing.assert_array_equal(trained, soft_prompts.load(done.folder / "stage1" / task, (), force=True)[0])
    single = alone.stages["stage1"][1]["prompt/tiny_review"]
    np.testing.assert_array_equal(single, done.stages["stage1/tiny_review"][1]["prompt/tiny_review"])
    assert {point.stage for point in done.run.curve} == {"stage2"}
    asked = [json.loads(line) for line in (done.folder / "outputs" / "target.jsonl").read_text().splitlines()]
    assert {row["task"] for row in asked} == {"tiny_review", "tiny_size"}


def test_target_is_asked_behind_each_tasks_own_prompt(
    tiny_folder: Path, finished: Any, opened: session.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = finished("multitask_promot")
    own = session.with_experiment(opened, bound(tiny_folder, "multitask_promot")["experiment"])
    seen: list[tuple[str, str]] = []
    stream = type(own.sampler).stream

    def watched(self: Any, params: Any, requests: Any) -> Any:
        seen.extend((request.text[:6], request.prompt) for request in requests)
        return stream(self, params, requests)

    monkeypatch.setattr(type(own.sampler), "stream", watched)
    params = Partitioner().place(trees.unflatten(done.stages["stage2"][1]))
    names = prompts_of_tasks(own.experiment, params["prompt"])
    scored = own.evaluator.target(params, "test", 2, names)
    assert set(seen) == {("Review", "tiny_review"), ("Animal", "tiny_size")}
    assert scored.entry.score == done.run.target.score
    assert prompts_of_tasks(own.experiment, {"tiny_pair": 0, "tiny_size": 0}) == {
        "tiny_review": "tiny_pair",
        "tiny_size": "tiny_size",
    }
    assert set(prompts_of_tasks(own.experiment, None).values()) == {""}


def test_stage2_takes_prompts_that_are_there(
    tiny_folder: Path, tmp_path: Path, finished: Any, opened: session.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    done = finished("multitask_promot")
    paths = {
        "tiny_size": str(done.folder / "stage1" / "tiny_size"),
        "tiny_review": str(finished("prompt_tuning").folder),
    }
    arguments = bound(tiny_folder, "multitask_promot", PROMPT_PATH=paths)
    own = session.with_experiment(opened, arguments["experiment"])
    run = run_method(own, tmp_path / "run", "multitask_promot", arguments["tuning"])
    assert run.steps == {"stage2": 2} and "takes the prompt of tiny_size" in capsys.readouterr().out
    assert run.target.score == done.run.target.score and run.icl == done.run.icl
    wrong = dataclasses.replace(arguments["experiment"], prompt_path={"tiny_sise": paths["tiny_size"]})
    with pytest.raises(UserError, match=r"'tiny_sise', which is no task of 'tiny_pair' \(did you mean 'tiny_size'\?\)"):
        initial_params.task_prompts(session.with_experiment(opened, wrong))


def test_a_stage_behind_given_and_trained_prompts_is_opened_again(
    tiny_folder: Path, tmp_path: Path, finished: Any, opened: session.Session
) -> None:
    done = finished("multitask_promot")
    arguments = bound(
        tiny_folder, "multitask_promot", PROMPT_PATH={"tiny_size": str(done.folder / "stage1" / "tiny_size")}
    )
    own = session.with_experiment(opened, arguments["experiment"])
    run = run_method(own, tmp_path / "run", "multitask_promot", arguments["tuning"])
    assert list(run.steps) == ["stage1/tiny_review", "stage2"]
    start = open_stage(tmp_path / "run" / "stage2", arguments["experiment"]).start
    assert set(start["prompt"]) == {"tiny_review", "tiny_size"}


def test_stage2_batch_mixes_tasks_and_unprompted_rows(
    tiny_folder: Path, finished: Any, opened: session.Session
) -> None:
    """Each row behind its own task's prompt, or none: what the model makes of it is what it makes of it alone."""
    params = trees.unflatten(finished("multitask_promot").stages["stage2"][1])
    experiment = dataclasses.replace(bound(tiny_folder, "multitask_promot")["experiment"], task="tiny_trio")
    own = session.with_experiment(opened, experiment)
    prompt, vocab = params["prompt"], opened.base.model.config.vocab_size
    prompt["other"] = np.ones((3, tiny.EMBED), np.float32)  # of no task here; its rows come first
    _, stream = train_batches(own, prompt, batch_size=16, layout=opened.base.model.layout)
    batch = next(iter(stream))
    virtual = [[int(i) - vocab for i in row if i >= vocab] for row in batch["tokens"]]
    of = {"": (), "tiny_review": (3, 4, 5, 6), "tiny_size": (7, 8, 9, 10)}  # in alphabetical order; a third has none
    assert {tuple(ids) for ids in virtual} == {*of.values()}
    texts = ["".join(tiny.TOKENS[i] for i in row if i < vocab) for row in batch["tokens"]]
    for said, ids in zip(texts, virtual, strict=True):
        assert of["tiny_size" if "Animal" in said else "tiny_review" if "Review" in said else ""] == tuple(ids)

    model, table = opened.base.model, soft_prompts.table(prompt)
    hidden = jax.jit(model.hidden)
    together = np.asarray(hidden(params["model"], table, batch))
    for task, ids in of.items():
        rows = [row for row, found in enumerate(virtual) if tuple(found) == ids][:2]
        alone = {name: array[rows] for name, array in batch.items()}
        shift = np.where(alone["tokens"] >= vocab, alone["tokens"] - (ids[0] if ids else 0), alone["tokens"])
        own_table = np.asarray(prompt[task]) if ids else None
        want = hidden(params["model"], own_table, alone | {"tokens": shift})
        np.testing.assert_allclose(together[rows], want, rtol=1e-4, atol=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_method_without_what_it_needs(tiny_folder: Path, tmp_path: Path, opened: session.Session) -> None:
    arguments = bound(tiny_folder, "replay")
    for method, change, message in (
        ("replay", {"replay": None}, "Method 'replay' needs a value for 'replay': set Tuning.replay"),
        ("freeze", {"freeze": ()}, "Method 'freeze' needs a value for 'freeze': set FREEZE"),
        ("l2sp", {"l2sp_weight": 0.0}, "l2sp_weight is 0.0, but has to be positive and finite: set L2SP_WEIGHT"),
        ("kl", {"kl_weight": 0.0}, "kl_weight is 0.0"),
        ("wise_ft", {"alphas": ()}, "at least one above 0"),
        ("multitask_promot", {}, "'tiny_review' is a single one: set MIXTURE_OR_TASK_NAME to a mixture"),
    ):
        with pytest.raises(UserError, match=message):
            run_method(opened, tmp_path, method, dataclasses.replace(arguments["tuning"], settings=change))
    assert not any(tmp_path.iterdir())


def test_one_stage_of_a_method_by_itself(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train_stage` takes every stage that is a whole method, with hyperparameters by name."""
    shorter = {name: value for name, value in SHORT.items() if name != "PROMPT_TRAIN_STEPS"}
    macros: dict[str, object] = shorter | {"train_stage.stage": "lora"}
    assert main.main(tiny.command(tiny_folder, "finetune.gin", tmp_path / "lora", **macros)) == 0
    assert schema.read_run(tmp_path / "lora").method == "lora"
    macros = shorter | {"train_stage.stage": "l2sp", "train_stage.hyperparameters": {"l2sp_weight": 0.5}}
    assert main.main(tiny.command(tiny_folder, "finetune.gin", tmp_path / "l2sp", **macros)) == 0
    run = schema.read_run(tmp_path / "l2sp")
    assert (run.method, run.settings["l2sp/l2sp_weight"]) == ("l2sp", 0.5)
    for stage, given, message in (
        ("replay", {}, "Method 'replay' needs a value for 'replay'"),
        ("freeze", {}, "Method 'freeze' needs a value for 'freeze'"),
        ("kl", {"kl_weight": 0.0}, "kl_weight is 0.0"),
        ("kl", {"kl_weigth": 0.1}, "Method 'kl' has no hyperparameter 'kl_weigth' (did you mean 'kl_weight'?)"),
        ("kl", {"kl_weight": "x"}, "train_stage.hyperparameters.kl_weight has to be a number, not 'x'"),
    ):
        macros = shorter | {"train_stage.stage": stage, "train_stage.hyperparameters": given}
        assert main.main(tiny.command(tiny_folder, "finetune.gin", tmp_path / "none", **macros)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [2, 4])
def test_ranks_of_the_paper(tiny_folder: Path, rank: int) -> None:
    arguments = bound(tiny_folder, f"promot_lora_r{rank}", LORA_RANK=7)
    first, second = arguments["tuning"].method(arguments["method"]).stages
    assert first.lora == second.lora and first.lora.rank == rank
    assert arguments["tuning"].method("lora").lora.rank == 7


@pytest.mark.parametrize("method", methods.METHODS)
def test_one_shot_is_said_by_the_name_of_any_method(method: str) -> None:
    """The method accepts the 1-shot form of the task or mixture that it trains on."""
    task = {"MIXTURE_OR_TASK_NAME": "movie_and_tweets"} if methods.METHODS[method].needs_mixture else {}
    overrides = list({"METHOD": f"{method}_1shot", **task}.items())
    arguments = binding.bind(main.CONFIGURABLES, [gin_files.folder() / "method.gin"], overrides).keywords
    assert methods.parse(arguments["method"]) == (method, 1)
    before = arguments["experiment"]
    after = before.with_shots(1)
    assert after.task == f"{before.task}_1shot" and before.with_shots(0) == before
    assert after.lengths == {"inputs": 98, "targets": 2}
    import_tasks([after.modules])
    session.check_method(after, arguments["tuning"].method(method), arguments["tuning"])
    assert len(task_names(after.task)) == len(task_names(before.task))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), [("promot", "tiny_review"), ("multitask_promot", "tiny_pair")])
def test_one_shot_runs(tiny_folder: Path, tmp_path: Path, method: str, task: str) -> None:
    macros: dict[str, object] = SHORT | {"METHOD": f"{method}_1shot", "MIXTURE_OR_TASK_NAME": task}
    assert main.main(tiny.command(tiny_folder, "method.gin", tmp_path / "run", **macros)) == 0
    run = schema.read_run(tmp_path / "run")
    assert run.target.task == f"{task}_1shot" and run.method == method


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_a_method_is_found_by_its_file() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {method.__module__.rpartition(".")[2] for method in methods.METHODS.values()} == files
    assert methods.find("l2sp") is methods.METHODS["l2sp"] and methods.REFERENCE == "pretrained"
    with pytest.raises(UserError, match=r"Unknown method 'value_onl' \(did you mean 'value_only'\?\)"):
        methods.find("value_onl")


def test_hyperparameters_that_methods_share_are_the_same() -> None:
    fields = [field for method in methods.METHODS.values() for field in dataclasses.fields(method)]
    for field in fields:
        shared = methods.hyperparameters()[field.name]
        assert (field.type, field.default) == (shared.type, shared.default)


def test_no_module_outside_knows_a_method() -> None:
    """Loop, sweep, report and precompile ask the registry; the job `promot` runs the methods that it is named by."""
    package = Path(methods.__file__).parents[1]
    names = "|".join({*methods.METHODS, *methods.stage_names()} - {"freeze", "lora", "replay", "promot", "pretrained"})
    known = re.compile(rf"""(?<![\w/])["']({names})["']|methods\.({names})\b""")
    for path in package.rglob("*.py"):
        place = path.relative_to(package).as_posix()
        code = re.sub(r'"{3}.*?"{3}', "", path.read_text("utf-8"), flags=re.DOTALL)
        if not place.startswith("methods/") and place not in HISTORY:
            assert not known.search(code), place


# What earlier versions called things, what a person is told of (`precompile`), a checkpoint's own words.
# The library offers two methods as functions.
HISTORY = ("experiments/resume_guard.py", "sweep/grid.py", "jobs/precompile.py", "api.py")
