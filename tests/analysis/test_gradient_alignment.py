"""Gradient alignment: against gradients worked out plainly, for both families, with and without a prompt."""

import itertools
import json

import jax
import numpy as np
import pytest
import tiny
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import main, trees
from promot_jax.analysis import gradient_alignment as alignment
from promot_jax.distributed import preemption
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import soft_prompts
from promot_jax.training.losses import cross_entropy

pytestmark = pytest.mark.slow

CONFIGS = {"decoder": DecoderConfig(40, 16, 4, 2, 3, 8, 24), "t5": T5Config(40, 16, 2, 2, 3, 8, 24)}


def example_rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, (6, 9)).tolist()
    return [[Tokens([40, 41, *row[:5]], row[5 : 6 + number % 3])] for number, row in enumerate(ids)]


@pytest.mark.parametrize(("name", "label_smoothing"), [("decoder", 0.0), ("t5", 0.1)])
def test_cosines_are_those_of_whole_gradients(name, label_smoothing):
    model = build(CONFIGS[name])
    params = jax.jit(model.init)(jax.random.key(1))
    table = soft_prompts.table({"task": jax.random.normal(jax.random.key(2), (2, 16))})
    rows = example_rows()
    both = [model.layout(one, 8, 4) for one in (rows, alignment.shuffled(rows, np.random.default_rng(3)))]

    @jax.jit
    def gradient(batch):
        def loss(params):
            logits = target_logits(model, params, table, batch)
            return cross_entropy(logits, batch["targets"], batch["weights"], label_smoothing)

        return trees.flatten(jax.grad(loss)(params))

    def cosine(paths, pick):
        first, second = (np.concatenate([pick(one[path]).ravel() for path in paths]) for one in (real, other))
        return first @ second / np.sqrt((first @ first) * (second @ second))

    real, other = (jax.device_get(gradient(batch)) for batch in both)
    cosines = alignment.measure(model, label_smoothing)
    found = cosines(params, table, *both)
    layers = [path for path in real if "/layers/" in path]
    groups = {
        "MLP": [path for path in layers if "/mlp/" in path],
        **{name: [path for path in layers if path.endswith(f"/{name}/kernel")] for name in ("query", "key", "value")},
        "all": layers,
    }
    for group, paths in groups.items():
        assert paths
        np.testing.assert_allclose(found["all layers"][group], cosine(paths, lambda x: x), rtol=1e-4)
        last = [path for path in paths if path.startswith("decoder/")]
        np.testing.assert_allclose(found["last decoder layer"][group], cosine(last, lambda x: x[-1]), rtol=1e-4)
        assert -1 <= found["all layers"][group] < 0.999
    same = cosines(params, table, both[0], both[0])
    np.testing.assert_allclose(jax.tree.leaves(same), 1.0, rtol=1e-5)
    assert found["last decoder layer"]["query"] != found["all layers"]["query"]
    assert cosines(params, -table, *both)["all layers"]["MLP"] != found["all layers"]["MLP"]  # the prompt counts


def test_shuffling_moves_targets_only():
    rows = example_rows()
    others = alignment.shuffled(rows, np.random.default_rng(0))
    assert [row[0].inputs for row in others] == [row[0].inputs for row in rows]
    assert sorted(row[0].targets for row in others) == sorted(row[0].targets for row in rows)
    assert others == alignment.shuffled(rows, np.random.default_rng(0)) != rows
    moved = np.mean([a[0].targets != b[0].targets for a, b in zip(rows, others, strict=True)])
    assert alignment.changed(rows, others) == moved > 0 == alignment.changed(rows, rows)


def test_summary_of_several_batches():
    assert alignment.summary([0.5, 1.0]) == {
        "mean": 0.75,
        "std": pytest.approx(0.5**1.5),
        "low": 0.5,
        "high": 1.0,
        "n": 2,
    }
    assert alignment.summary([0.5])["std"] == 0
    nothing = alignment.summary([0.5, float("nan")])
    assert nothing == {"mean": None, "std": None, "low": None, "high": None, "n": 2}


# ---- the job ---------------------------------------------------------------------------------------------------------


def job(folder, workdir, run, **macros):
    command = tiny.command(folder, "gradient_alignment.gin", workdir, RUN=run, BATCHES=4, **macros)
    return main.main(command)


@pytest.fixture(name="promot", scope="module")
def _promot(tiny_folder):
    workdir = tiny_folder / "kept"
    keep = {"model/Training.keep_period": 2, "SEED": 3}
    assert main.main(tiny.command(tiny_folder, "promot.gin", workdir, **keep)) == 0
    return workdir


@pytest.mark.parametrize("method", ["promot_lora", "lora"])
def test_along_stages_with_lora(tiny_folder, tmp_path, method):
    workdir = tmp_path / "run"
    short = dict.fromkeys(("TRAIN_STEPS", "PROMPT_TRAIN_STEPS", "EVAL_PERIOD", "PROMPT_EVAL_PERIOD"), 2)
    assert main.main(tiny.command(tiny_folder, "method.gin", workdir, METHOD=f"'{method}'", **short)) == 0
    found = {}
    for stage in ("stage1_lora", "stage2_lora") if method == "promot_lora" else ("lora",):
        assert job(tiny_folder, tmp_path / stage, workdir / stage, STEPS="(0, 2)") == 0
        points = json.loads((tmp_path / stage / "results.json").read_text())["points"]
        found[stage] = [[point["mean"] for point in points if point["step"] == step] for step in (0, 2)]
        assert {point["prompt"] for point in points} == {""} and found[stage][0] != found[stage][1]
    if method == "promot_lora":  # stage 2 starts with the LoRA that stage 1 ends with
        assert found["stage2_lora"][0] == found["stage1_lora"][1]


def test_chosen_checkpoints_are_kept(promot):
    assert {path.name for path in (promot / "stage2" / "checkpoints").iterdir()} >= {"2", "4", "6"}
    assert len(list((promot / "stage1" / "checkpoints").iterdir())) <= 2  # the newest and the best


def test_along_a_run_with_and_without_its_prompt(tiny_folder, promot):
    workdir = promot / "analyses" / "stage2"
    # SEED and the prompt's length are the run's own, whatever is given here.
    assert job(tiny_folder, workdir, promot / "stage2", STEPS="(0, 2, 6)", PROMPT_LENGTH=9) == 0
    found = json.loads((workdir / "results.json").read_text())
    assert (found["stage"], found["task"], found["seed"], found["batch_size"]) == ("stage2", "tiny_review", 3, 4)
    keys = [(point["step"], point["prompt"], point["scope"], point["group"]) for point in found["points"]]
    assert keys == list(itertools.product((0, 2, 6), ("tiny_review", ""), alignment.SCOPES, alignment.GROUPS))
    assert all(-1 <= p["low"] <= p["mean"] <= p["high"] <= 1 + 1e-6 and p["n"] == 4 for p in found["points"])
    by_step = [[p["mean"] for p in found["points"] if p["step"] == step] for step in (0, 2, 6)]
    assert by_step[0] != by_step[1] != by_step[2]
    prompted, plain = ([p["mean"] for p in found["points"] if p["prompt"] == name] for name in ("tiny_review", ""))
    assert prompted != plain and 0 < found["changed"] < 1
    assert "<svg" in (workdir / "gradient_alignment.svg").read_text()
    assert (workdir / "gradient_alignment_stripped.svg").is_file()
    # Another process of the same settings finds the same.
    assert job(tiny_folder, promot / "again", promot / "stage2", STEPS=6) == 0
    again = json.loads((promot / "again" / "results.json").read_text())["points"]
    assert again == [point for point in found["points"] if point["step"] == 6]


def test_a_stage_that_trains_the_prompt(tiny_folder, promot):
    assert job(tiny_folder, promot / "of_prompt", promot / "stage1", STEPS="(0, 6)") == 0


def test_a_preemption_leaves_nothing(tiny_folder, promot, monkeypatch):
    monkeypatch.setattr(preemption, "stops", lambda: True)
    assert job(tiny_folder, promot / "preempted", promot / "stage2", STEPS="(0, 6)") == main.PREEMPTED
    assert not (promot / "preempted" / "results.json").exists()


@pytest.mark.parametrize(
    ("run", "macros", "message"),
    [
        ("stage2", {"STEPS": "(0, 3)"}, "no checkpoint of step 3 (it has 0, 2, 4, 6)"),
        ("stage2", {"STEPS": "(2, 2)"}, "each step once"),
        ("stage2", {"STEPS": "()"}, "each step once"),
        ("nowhere", {}, "is no stage's folder"),
        ("pretrained", {}, "is no stage's folder"),
    ],
)
def test_refusals(tiny_folder, promot, capsys, run, macros, message):
    workdir = promot / f"refused_{run}_{len(str(macros))}"
    assert job(tiny_folder, workdir, promot / run, **macros) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (workdir / "results.json").exists()


def test_run_whose_base_model_was_replaced(tiny_folder, promot, capsys, tmp_path):
    kept = (tiny_folder / "tiny.gguf").read_bytes()
    try:
        tiny.write(tiny_folder / "tiny.gguf", tiny.tensors(seed=9))
        assert job(tiny_folder, tmp_path, promot / "stage2", STEPS=0) == 2
    finally:
        (tiny_folder / "tiny.gguf").write_bytes(kept)
    assert "another base model" in capsys.readouterr().err
