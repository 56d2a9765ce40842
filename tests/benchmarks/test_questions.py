"""Every question: its cases call functions that exist with arguments that they have, and its ratios have sides."""

import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import QUESTIONS, harness, machine, models, performance, prompts, question
from benchmarks.harness import Case
from promot_jax.distributed import cpu


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models and prompts are taken to be there; results go to a folder of the test."""
    monkeypatch.setattr(models, "smollm2", lambda dtype="float32": tmp_path / dtype)
    monkeypatch.setattr(models, "decoder", lambda quick: tmp_path / "decoder")
    monkeypatch.setattr(models, "t5", lambda quick: tmp_path / "t5")
    monkeypatch.setattr(prompts, "ensure", lambda *arguments: tmp_path / "prompts.jsonl")
    monkeypatch.setattr(machine, "fast_bfloat16", lambda: True)
    monkeypatch.setattr("promot_jax.assets.resolve", lambda name: tmp_path / "model.gguf")
    monkeypatch.setattr(harness, "FOLDER", tmp_path / "bench")
    return tmp_path


def cases(name: str, quick: bool) -> list[Case]:
    return list(importlib.import_module(f"benchmarks.{name}").QUESTION.cases(quick))


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.usefixtures("made")
def test_cases_fit_their_functions(name: str, quick: bool) -> None:
    for case in cases(name, quick):
        for side in case.sides:
            module, function = side.function.split(":")
            target = getattr(importlib.import_module(module), function)
            for variant in side.variants.values():
                settings = {**side.settings, **variant}
                inspect.signature(target).bind(**settings)
                json.dumps(settings)
        names = [side.name for side in case.sides]
        assert len({*names}) == len(names)
        assert all(ratio.of in names and ratio.over in [*names, ""] for ratio in case.ratios)
        assert {*case.warm_up} <= {*names}


@pytest.mark.usefixtures("made")
def test_every_goal_has_a_ratio() -> None:
    keys = {ratio.key for name in QUESTIONS for case in cases(name, False) for ratio in case.ratios}
    later = {"icl_eval_vs_lm_eval_per_task"} | {key for key in performance.GOALS if key.startswith("batch_packing")}
    assert {*performance.GOALS} - later <= keys


@pytest.mark.parametrize("name", QUESTIONS)
def test_header_tells_the_time(name: str) -> None:
    assert "\nTime: " in (importlib.import_module(f"benchmarks.{name}").__doc__ or "")


def test_an_answer_is_written(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(function: str, settings: Mapping[str, Any]) -> dict[str, float]:
        return {"seconds": 2.0 if "jax" in str(settings) else 1.0, "peak_bytes": 5e8}

    start_up = importlib.import_module("benchmarks.start_up").QUESTION
    question.answer(start_up, 2, True, run)
    document = json.loads((made / "bench" / "quick" / "start_up.json").read_text("utf-8"))
    assert (document["question"], document["pairs"], document["quick"]) == ("start_up", 2, True)
    assert document["ratios"] == {"help_s": 2.0, "help_vs_lm_eval": 2.0, "import_s": 2.0}
    assert document["machine"]["cores"] >= 1 and document["machine"]["versions"]["jaxlib"]
    assert "help_vs_lm_eval 2.000" in capsys.readouterr().out
    assert not (made / "bench" / "start_up.json").exists()


def test_a_question_has_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(question, "answer", lambda *arguments: asked.append(arguments))
    one = question.Question("one", lambda quick: [], {})
    question.main(one, ["--pairs", "7"])
    question.main(one, ["--quick"])
    assert asked == [(one, 7, False), (one, question.PAIRS, True)]


def test_several_questions_have_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as several

    asked: list[Any] = []
    monkeypatch.setattr(
        question, "answer", lambda one, pairs, quick: asked.append((one.name, pairs, quick)) or one.name
    )
    monkeypatch.setattr(performance, "keep", lambda answer: asked.append(f"{answer} kept"))
    monkeypatch.setattr(performance, "rewrite", lambda: asked.append("rewritten"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "packing", "--pairs", "3"])
    several.main()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "loading", "start_up", "--quick"])
    several.main()
    assert asked == [("packing", 3, False), "packing kept", "rewritten", ("loading", 5, True), ("start_up", 5, True)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step_stage3"])
    with pytest.raises(SystemExit, match="2"):
        several.main()


def test_flags_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "field", lambda name: "fpu avx2 avx512f amx_bf16x")
    assert machine.flags() == ["avx2", "avx512f"] and not machine.fast_bfloat16()
    monkeypatch.setattr(cpu, "field", lambda name: "fpu avx2 avx512f amx_bf16")
    assert machine.fast_bfloat16()


def test_columns_name_measures() -> None:
    for name in QUESTIONS:
        columns = importlib.import_module(f"benchmarks.{name}").QUESTION.columns
        assert columns and all(dataclasses.is_dataclass(column) for column in columns.values())


@pytest.mark.usefixtures("made")
def test_jobs_have_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import commands, packing
    from promot_jax import main
    from promot_jax.config import binding, gin_files

    started: list[list[str]] = []
    monkeypatch.setattr(commands, "updates", lambda command, stage, steps: started.append(command) or 1.0)
    packing.measure("folder", "rte_like", 1, {})
    for name in ("first_step", "icl_eval"):
        started += [
            side.settings["command"] for case in cases(name, False) for side in case.sides if "command" in side.settings
        ]
    jobs = [command for command in started if "promot_jax.main" in command]
    assert len(jobs) >= 4
    for command in jobs:
        values, overrides = main.parse_flags(command[3:])
        paths = [gin_files.find(name, (gin_files.folder(),)) for name in values.gin_file]
        assert binding.bind(main.CONFIGURABLES, paths, overrides).func.__name__ in ("train_stage", "icl_eval")
