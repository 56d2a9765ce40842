"""Runs at Weights & Biases and Trackio, with modules of the same interface in their place (`tests/stand_ins`)."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from random_results import random_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from promot_jax.distributed import hosts
from promot_jax.errors import PreemptedError, UserError
from promot_jax.results.scores import Sample
from promot_jax.trackers import settings as settings_module
from promot_jax.trackers.run import tracked
from promot_jax.trackers.settings import Tracker

STAND_INS = Path(__file__).parents[1] / "stand_ins"
SAMPLE = Sample(task="tiny_review", input="Review: fine\nLabel:", target="good", output="bad")


@pytest.fixture(name="service", params=["wandb", "trackio"])
def _service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    module = importlib.import_module(request.param)
    yield module
    del sys.modules[request.param]


def ended(run: Any) -> bool | None:
    """Whether a stand-in's run ended well; None while it runs."""
    return run.finished or None if hasattr(run, "finished") else None if run.exit_code is None else run.exit_code == 0


def train(folder: Path, tracker: Tracker, steps: range) -> None:
    """What a run reports of two stages."""
    with tracked(tracker, folder, {"seed": 3, "tuning": {"stage1": {"steps": 4}}}) as run:
        with run.stage(folder / "stage1", "stage1") as writer:
            for step in steps:
                writer.scalars(step, {"train/loss": 1.0 / step})
            writer.outputs(steps[-1], [SAMPLE])
        with run.stage(folder / "stage2" / "tiny_review", "stage2") as writer:
            writer.scalars(1, {"eval/target": 50.0})
        run.final(random_run("promot", 0))


def test_a_run_has_its_settings_numbers_by_stage_and_step_and_outputs(service: Any, tmp_path: Path) -> None:
    train(tmp_path, Tracker(service.__name__, "reviews"), range(1, 3))
    (run,) = service.runs
    assert run.options["project"] == "reviews" and str(tmp_path) in run.options["name"]
    assert run.options["config"] == {"seed": 3, "tuning": {"stage1": {"steps": 4}}}
    first, second, outputs, evaluation, final = run.logged
    assert first == {"stage1/train/loss": 1.0, "stage1/step": 1}
    assert second == {"stage1/train/loss": 0.5, "stage1/step": 2}
    assert evaluation == {"stage2/tiny_review/eval/target": 50.0, "stage2/tiny_review/step": 1}
    table = outputs["stage1/generations"]
    assert outputs["stage1/step"] == 2 and table.columns == ["task", "input", "target", "output"]
    assert table.data == [["tiny_review", "Review: fine\nLabel:", "good", "bad"]]
    results = random_run("promot", 0)
    assert final["final/target"] == results.target.score and final["final/icl_1shot"] == results.icl["1"].norm_avg
    assert final["final/format_share_4shot"] == results.icl["4"].format_share
    if service.__name__ == "wandb":
        assert run.step_metrics["stage1/*"] == "stage1/step" and run.options["dir"] == tmp_path
    assert ended(run) is True
    events = EventAccumulator(str(tmp_path / "stage1" / "events")).Reload()  # TensorBoard's, too
    assert set(events.Tags()["tensors"]) == {"train/loss", "generations/tiny_review"}


def test_a_resumed_run_is_the_same_run(service: Any, tmp_path: Path) -> None:
    tracker = Tracker(service.__name__)
    with pytest.raises(PreemptedError), tracked(tracker, tmp_path / "a", {}):
        raise PreemptedError("stopped")
    assert ended(service.runs[0]) is not None
    train(tmp_path / "a", tracker, range(1, 2))
    train(tmp_path / "b", tracker, range(1, 2))
    again, before, other = (
        [run.options[key] for key in ("name", "id") if key in run.options]
        for run in (service.runs[1], service.runs[0], service.runs[2])
    )
    assert again == before != other
    assert json.loads((tmp_path / "a" / "tracker.json").read_text())["name"] == before[0]
    (tmp_path / "a" / "tracker.json").unlink()  # as in a folder that was deleted: then it is another run
    train(tmp_path / "a", tracker, range(1, 2))
    assert [service.runs[3].options[key] for key in ("name", "id") if key in service.runs[3].options] != before


def test_another_host_reports_nothing(service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "is_writer", lambda: False)
    monkeypatch.setattr(hosts, "decide", lambda function, what: None)
    train(tmp_path, Tracker(service.__name__), range(1, 3))
    assert not service.runs and not list(tmp_path.rglob("*"))


def test_what_keeps_a_tracker_from_starting_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError) as error, tracked(Tracker("wandb", "refused"), tmp_path, {}):
        pass
    del sys.modules["wandb"]
    message = str(error.value)
    assert message.startswith("Weights & Biases (TRACKER = 'wandb') fails (RuntimeError: No API key configured. Use ")
    assert message.endswith("; log in with `wandb login`, or set WANDB_MODE=offline.") and "\n" not in message


def test_a_tracker_that_is_not_there_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install 'promot_jax\[wandb\]'"):
        Tracker("wandb")
    with pytest.raises(UserError, match=r"TRACKER is 'wandbb', which is no tracker \(did you mean 'wandb'\?\)"):
        Tracker("wandbb")
    assert Tracker().name == ""
