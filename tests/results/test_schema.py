"""Layout, validation and writing of results.json."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from promot_jax import files
from promot_jax.errors import UserError
from promot_jax.report import tables
from promot_jax.results import provenance, records
from promot_jax.results import schema as results
from promot_jax.results.comparison import as_comparison, comparison
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Icl, Sample, Score, StepEvaluation, Target

NAN = float("nan")


def make_run(method="promot", seed=0, **extra):
    """A run with invented numbers."""
    tasks = {
        "capital": Score(metric="exact_match", score=55.0, ci95=(40.0, 60.0), n=100, format_share=2.0),
        "negation": Score(metric="rouge2", score=25.0, n=50, format_share=4.0),
    }
    fields = {
        "steps": {"stage1": 100, "stage2": 60},
        "seconds": 12.5,
        "target": Target(task="sentiment", metric="accuracy", score=91.2, ci95=(88.0, 94.1), n=400),
        "icl": {"1": Icl.of(tasks, ci95=(35.0, 45.0))},
        "curve": [StepEvaluation(step=20, stage="stage2", loss=NAN, target=90.0, icl=40.0)],
    }
    return Run.of(method=method, seed=seed, **fields | extra)


def test_a_file_has_the_layout_of_the_documentation():
    run = files.plain(make_run(settings={"learning_rate": 1e-4}))
    score = {"metric": "accuracy", "score": 91.2, "ci95": [88.0, 94.1], "n": 400, "format_share": None}
    assert run["target"] == {"task": "sentiment", **score}
    assert run["icl"]["1"]["norm_avg"] == 40.0
    assert run["icl"]["1"]["format_share"] == 3.0
    assert run["icl"]["1"]["ci95"] == [35.0, 45.0]
    assert run["icl"]["1"]["tasks"]["capital"]["n"] == 100
    point = {"step": 20, "stage": "stage2", "loss": None, "target": 90.0, "icl": 40.0, "format_share": None}
    assert run["curve"] == [point]
    assert run["settings"] == {"learning_rate": 1e-4}
    assert set(run) >= {"method", "seed", "steps", "seconds", "versions", "commit"}
    assert run["schema_version"] == records.SCHEMA_VERSION


def test_further_keys_are_allowed_and_a_newer_layout_is_refused(tmp_path):
    document = files.plain(make_run()) | {"further": 1}
    document["target"]["further"] = {"a": []}
    assert results.read(files.write(document, tmp_path / "r.json")) == make_run()
    del document["schema_version"]  # written before it was counted
    assert results.read(files.write(document, tmp_path / "r.json")) == make_run()
    document["schema_version"] = records.SCHEMA_VERSION + 1
    with pytest.raises(UserError, match=r"r.json' has the layout 2 of a newer promot_jax: read it with that version\."):
        results.read(files.write(document, tmp_path / "r.json"))


def test_averages_are_absent_where_a_task_has_no_score():
    known = Score(metric="exact_match", score=50.0, n=10)
    open_task = Icl.of({"a": known, "b": records.replace(known, score=None)})
    assert open_task.norm_avg is None
    assert open_task.format_share is None
    assert Icl.of({}).norm_avg is None


def test_round_trip_of_a_run_and_a_comparison(tmp_path):
    runs = [make_run("promot", 1), make_run("promot", 0), make_run("finetune", 0)]
    path = files.write(runs[0], tmp_path / "new" / "folder" / "results.json")
    assert results.read(path) == runs[0]
    assert results.read(path.parent) == results.read_run(path.parent) == runs[0]
    both = comparison(runs)
    assert list(both.methods) == ["promot", "finetune"]
    assert [run.seed for run in both.methods["promot"]] == [0, 1]
    assert results.read(files.write(both, tmp_path / "all.json")) == both
    assert as_comparison(both) is both
    assert as_comparison(runs[0]) == Comparison(methods={"promot": [runs[0]]})


def test_arrays_and_numbers_that_are_not_finite_become_plain_json(tmp_path):
    value = {
        "a": np.float32(1.5),
        "b": np.array([1.0, NAN, math.inf]),
        "c": (np.int64(3), -math.inf),
        4: Path("x"),
        "d": np.bool_(True),
        "e": None,
    }
    path = files.write(value, tmp_path / "r.json")
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text()) == {
        "a": 1.5,
        "b": [1.0, None, None],
        "c": [3, None],
        "4": "x",
        "d": True,
        "e": None,
    }
    for unknown in ({"a": object()}, records.replace(make_run(), settings={"a": object()})):
        with pytest.raises(TypeError):
            files.write(unknown, path)
    settings = {"a": np.float32(1.5), "b": np.array([1.0, NAN]), "c": Path("x"), "d": (np.int64(1),)}
    assert make_run(settings=settings).settings == {"a": 1.5, "b": [1.0, None], "c": "x", "d": [1]}


def test_model_output_of_any_kind_survives(tmp_path):
    output = 'quote " \\ \n \u2028 é 中 \ud83d lone \x00'
    run = make_run(samples=[Sample(task="t", input="", target="", output=output)])
    assert results.read(files.write(run, tmp_path / "r.json")).samples[0].output == output


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = files.write({"a": 1}, tmp_path / "r.json")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [member.name for member in tmp_path.iterdir()] == ["r.json"]


def test_files_and_folders_are_as_readable_as_others(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    path = files.write({}, tmp_path / "r.json")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with files.replacing(tmp_path / "new" / "made") as made:
        made.mkdir()
        (made / "file").write_text("text")
        assert not (tmp_path / "new" / "made").exists()
    assert (tmp_path / "new" / "made").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["made", "file"]


def changed(path, value):
    """The run with the entry at a dotted path replaced, or removed for `...`."""
    run = files.plain(make_run())
    *parents, last = path.replace("a.b[0]", "a/b[0]").split(".")
    last = last.replace("/", ".")
    entry = run
    for key in parents:
        entry = entry[int(key) if isinstance(entry, list) else key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return run


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("method", ..., "the whole file: Object missing required field `method`"),
        ("curve", ..., "missing required field `curve`"),
        ("seed", "0", "seed: Expected `int`, got `str`"),
        ("seed", True, "seed: Expected `int`, got `bool`"),
        ("seed", -1, "seed: Expected `int` >= 0"),
        ("steps", {"stage1": -1}, "steps.stage1: "),
        ("target.task", None, "target.task: Expected `str`, got `null`"),
        ("target.score", 101, "target.score: Expected `float` <= 100"),
        ("target.ci95", [90, 80], "target: ci95 should be [low, high]"),
        ("target.n", ..., "target: Object missing required field `n`"),
        ("target.tasks", [], "target.tasks: Expected `object`"),
        ("target.tasks", {"rte": {"metric": "accuracy", "score": 101}}, "target.tasks.rte.score: "),
        ("icl", [], "icl: Expected `object`, got `array`"),
        ("icl", {"one": {"tasks": {}}}, "icl.one should be keyed by a number of shots"),
        ("icl.1.tasks", None, "icl.1.tasks: Expected `object`"),
        ("icl.1.ci95", 5, "icl.1.ci95: "),
        ("icl.1.tasks.capital.metric", ..., "icl.1.tasks.capital: Object missing required field `metric`"),
        ("icl.1.tasks.a.b[0]", {"metric": 1}, "icl.1.tasks.a.b[0].metric: Expected `str`"),
        ("curve.0.step", 1.5, "curve[0].step: Expected `int`, got `float`"),
        ("curve.0.stage", "stage3", "curve[0]: unknown stage 'stage3' (did you mean 'stage"),
        ("curve.0.icl", "high", "curve[0].icl: "),
        ("curve.0.loss", "low", "curve[0].loss: Expected `float | null`, got `str`"),
        ("matched", {"step": None}, "matched.step: "),
        ("matched", {"step": 3, "icl": []}, "matched.icl: "),
        ("samples", [{"task": "t"}], "samples[0]: Object missing required field `input`"),
        ("samples", "none", "samples: Expected `array`, got `str`"),
        ("settings", 3, "settings: Expected `object`"),
        ("versions", [], "versions: Expected `object`"),
        ("seconds", "long", "seconds: Expected `float | null`, got `str`"),
    ],
)
def test_a_malformed_file_is_refused_in_one_sentence(tmp_path, path, value, words):
    file = files.write(changed(path, value), tmp_path / "r.json")
    with pytest.raises(UserError) as refused:
        results.read(file)
    message = str(refused.value)
    assert words in message
    assert "r.json" in message
    assert "\n" not in message
    assert message.endswith("; restore it, or delete it and run the job that writes it again.")


def test_the_place_in_a_comparison_names_method_and_run(tmp_path):
    document = {"methods": {"finetune": [files.plain(make_run("finetune"))], "promot": [files.plain(make_run())]}}
    document["methods"]["promot"][0]["icl"]["1"]["tasks"]["negation"]["n"] = -3
    with pytest.raises(UserError, match=r"methods.promot\[0\].icl.1.tasks.negation.n: Expected `int` >= 0"):
        results.read(files.write(document, tmp_path / "r.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "{}", '{"methods": []}', '{"methods": {"a": {}}}'])
def test_foreign_files_are_refused(tmp_path, content):
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(UserError):
        results.read(file)


def test_other_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results file"):
        results.read(tmp_path / "absent.json")
    with pytest.raises(UserError, match="no results file"):
        results.read(tmp_path)
    (tmp_path / "nan.json").write_text('{"seed": NaN}')
    with pytest.raises(UserError, match="NaN is not JSON"):
        results.read(tmp_path / "nan.json")
    for depth in (900, 100_000):  # Python's parser takes the first, what reads its document would not
        (tmp_path / "nested.json").write_text('{"settings": ' * depth + "1" + "}" * depth)
        with pytest.raises(UserError, match=r"cannot be read as JSON: .*(nested|recursion)"):
            results.read(tmp_path / "nested.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        results.read(tmp_path / "binary.json")


def test_runs_lie_under_their_method_and_seed_once(tmp_path):
    run = files.plain(make_run())
    for methods, message in (
        ({"finetune": [run]}, r"methods.finetune\[0\].method should be 'finetune', but is 'promot'"),
        ({"promot": [run, run]}, r"methods.promot\[1\].seed"),
    ):
        with pytest.raises(UserError, match=message):
            results.read(files.write({"methods": methods}, tmp_path / "r.json"))


def test_a_run_that_is_not_in_the_layout_is_not_made():
    with pytest.raises(UserError, match=r"A Run is not in its layout: target.score"):
        make_run(target=Target(task="t", metric="m", score=120.0, n=1))


def test_versions_names_what_is_installed_without_importing_it():
    code = "import sys, promot_jax.results.provenance as p; print(p.versions()); assert 'jax' not in sys.modules"
    root = Path(results.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "'numpy': '" in done.stdout
    versions = provenance.versions()
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"python", *provenance.PACKAGES}


def git(folder, *arguments):
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_of_the_checkout_the_package_lies_in(tmp_path, monkeypatch):
    package = tmp_path / "promot_jax"
    package.mkdir()
    module = package / "results.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() is None  # no repository
    git(tmp_path, "init", "-q")
    assert provenance.commit() is None  # no commit, and the package is not tracked
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "other")
    assert provenance.commit() is None  # somebody else's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    clean = provenance.commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "untracked").write_text("")
    assert provenance.commit() == clean
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a hook
    (tmp_path / "other").write_text("changed")
    assert provenance.commit() == clean + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None  # no git


def tuned(method, stage, targets, first=0):
    """A run whose curve has a point every 10 steps with these target scores, and tasks that lose a point per step."""
    curve = []
    for index, target in enumerate(targets):
        icl = 60.0 - index * 10
        tasks = {"capital": Score(metric="exact_match", score=icl, n=20, format_share=0.0)}
        scores = {"target": target, "target_ci95": (0.0, 100.0), "target_n": 30, "tasks": tasks, "icl": icl}
        curve.append(StepEvaluation(step=index * 10, stage=stage, **scores))
    return make_run(method, settings={"curve_shots": 1}, curve=curve[first:])


def test_a_comparison_holds_all_tasks_at_matched_target_score(tmp_path):
    finetune, promot = tuned("finetune", "finetune", [3, 70, 90]), tuned("promot", "stage2", [80, 60, 85, 88])
    joined = comparison([make_run("pretrained"), finetune, promot])
    found = joined.methods
    assert [found[name][0].matched.step for name in ("pretrained", "finetune", "promot")] == [0, 20, 30]
    matched = found["promot"][0].matched
    assert matched.target == Target(task="sentiment", metric="accuracy", score=88, ci95=(0.0, 100.0), n=30)
    assert matched.icl["1"].tasks["capital"].score == matched.icl["1"].norm_avg == 30.0
    assert found["pretrained"][0].matched.target.score == 3
    assert results.read(files.write(joined, tmp_path / "r.json")) == joined
    assert comparison(joined.runs) == joined
    alone = comparison([tuned("finetune", "finetune", [3, 70, 90])])
    assert alone.methods["finetune"][0].matched is None


@pytest.mark.parametrize(
    ("methods", "target"),
    [
        ({"promot": "stage2", "l2sp": "l2sp"}, 3),
        ({"promot": "stage2", "lora": "lora"}, 3),
        ({"multitask_promot": "stage2", "multitask_finetune": "finetune"}, 3),
        ({"promot": "stage2", "promot_lora": "stage2_lora"}, None),
        ({"joint": "joint", "random_prompt": "random_prompt"}, None),
        ({"promot": "stage2", "finetune_1shot": "finetune"}, None),  # which asks for the target behind an exemplar
    ],
)
def test_the_pretrained_model_stands_before_the_first_update_of_any_method(methods, target):
    """In context it is any method's step 0, which is stripped; on the target that of one without a prompt."""
    runs = [tuned(name, stage, [3 if target and i else 80, 70, 90]) for i, (name, stage) in enumerate(methods.items())]
    (found,) = comparison([make_run("pretrained", curve=[]), *runs]).methods["pretrained"]
    assert found.matched.step == 0 and found.matched.icl["1"].norm_avg == 60.0
    assert (found.matched.target.score if found.matched.target else None) == target
    assert records.checked(found) == found
    shown = tables.scores(comparison([found, *runs]), "matched")
    cells = {row.label: row.cells for row in shown.rows}
    assert cells["Norm. Avg."]["pretrained", "1"].value == 60.0
    assert (("pretrained", None) in cells["sentiment (accuracy, target)"]) == (target is not None)


def test_no_score_of_the_test_split_stands_among_those_at_matched_score():
    runs = [make_run(name, curve=[]) for name in ("pretrained", "prompt_tuning")]
    runs += [tuned("wise_ft", "wise_ft", [3, 70, 90], first=1), tuned("promot", "stage2", [80, 70, 90], first=1)]
    made = comparison(runs)
    assert made.methods["pretrained"][0].matched is None
    assert tables.scores(made, "matched").methods == ["wise_ft", "promot"]
