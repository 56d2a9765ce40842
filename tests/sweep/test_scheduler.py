"""The comparison: which cells run, what they share, what is chosen, and the report when some are missing."""

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tasks  # noqa: F401, registers
from random_results import alignment, read_comparison
from resumed import start
from test_grid import EXPERIMENT, RATES, TUNING, grid

from promot_jax import files, main
from promot_jax.checkpoints import stage_folder
from promot_jax.data.replay import Replay
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import HostError, PreemptedError, StorageError, TrainingError, UserError
from promot_jax.experiments import stage as runs
from promot_jax.experiments.settings import Experiment
from promot_jax.jobs import compare as jobs
from promot_jax.results import schema as results
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.records import replace
from promot_jax.results.scores import Draw, Icl, Sample, Score, StepEvaluation, Target
from promot_jax.sweep import collect as outcomes
from promot_jax.sweep import scheduler as compare
from promot_jax.sweep.grid import Grid
from promot_jax.sweep.shared_stages import share_stage
from promot_jax.training.settings import Tuning

# ---- running, with methods that take no time -------------------------------------------------------------------------


def stage_record(name: str, trains: Iterable[str] = ("prompt",)) -> results.StageRecord:
    """A finished stage of which nothing is known."""
    return results.StageRecord(stage=name, trains=list(trains), checkpoint="", base="", best_step=4, curve=[])


class Fake:
    """Stands in for `runs`: notes what is trained, and scores what it is told to."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.opened: list[str] = []
        self.workdir = Path()

    def run_method(self, session: Experiment, folder: Path, method: str, tuning: Tuning) -> None:
        if (folder / "results.json").exists():
            return
        place = folder.relative_to(self.workdir).as_posix()
        if place in self.broken:
            raise self.broken[place]
        curve: list[StepEvaluation] = []
        configured = tuning.method(method)
        weight = getattr(configured, "l2sp_weight", 0.0)
        for stage in configured.stages:
            name, rate = stage.name, tuning.of(stage).optimizer.learning_rate
            for part in ("tiny_review", "tiny_size") if stage.per_task else ("",):
                if not stage_folder.describe(folder / name / part):
                    self.trained.append((Path(place) / name / part).as_posix())
                    stage_folder.record(folder / name / part, stage_record(name, stage.trains))
            # Best at a rate of 0.01 for the model and 0.2 for the prompt; the last step is worse than the best one.
            # L2-SP costs a point of target score per unit, and gives ten of ICL.
            best = 90.0 - 10 * abs(rate - (0.2 if "prompt" in stage.trains else 0.01)) + session.seed - weight
            icl = 50.0 - session.seed + 10 * weight
            for step, score in ((0, 99.0), (1, best), (2, best), (4, best - 5)):
                curve.append(StepEvaluation(step=step, stage=name, target=score, icl=icl - step))
        steps = {stage.name: 4 for stage in configured.stages}
        draws = [Draw(norm_avg=40.0 + session.seed + draw) for draw in (-1, 0, 1)]
        scored = Icl.of({"a": Score(metric="accuracy", score=40.0 + session.seed, n=2)}, draws=draws)
        target = Target(task=session.task, metric="accuracy", score=80.0 + session.seed, n=2)
        run = results.Run.of(
            method=method,
            seed=session.seed,
            steps=steps,
            seconds=60.0,
            target=target,
            icl={"1": scored},
            curve=curve,
            best_step=dict.fromkeys(steps, 2),
        )
        files.write({"rate": 0.1}, folder / "settings.json")
        samples = [Sample(task="a", input="i", target="t", output="o")]
        files.write(replace(run, samples=samples), folder / "results.json")

    def open_session(
        self, experiment: Experiment, others: list[Experiment], *, check: Callable[[], None], trains: bool
    ) -> Experiment:
        assert trains
        check()
        self.opened = [other.task for other in others]
        return experiment

    def run(self, one: Grid, wait: bool = True, stale: float = 60.0, **given: Any) -> None:
        self.workdir = one.workdir
        self.trained.clear()
        compare.run(one, wait, stale, **given)


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(compare, "open_session", fake.open_session)
    monkeypatch.setattr(compare, "with_experiment", lambda session, experiment: experiment)
    monkeypatch.setattr(compare, "run_method", fake.run_method)
    return fake


def test_equal_stages_are_trained_once(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = grid(
        tmp_path, ("pretrained", "promot", "prompt_tuning", "promot_1shot"), varied={"learning_rate": (1e-3, 1e-2)}
    )
    fake.run(one)
    assert fake.trained == [
        "promot/learning_rate_0.001/seed_0/stage1",
        "promot/learning_rate_0.001/seed_0/stage2",
        "promot/learning_rate_0.01/seed_0/stage2",  # behind the same prompt
        "promot_1shot/learning_rate_0.001/seed_0/stage1",  # another task
        "promot_1shot/learning_rate_0.001/seed_0/stage2",
        "promot_1shot/learning_rate_0.01/seed_0/stage2",
    ]
    first, second = (
        tmp_path / name / "stage1/stage.json" for name in ("promot/learning_rate_0.001/seed_0", "prompt_tuning/seed_0")
    )
    assert second.read_bytes() == first.read_bytes()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("====")]
    assert lines[0] == "==== 1 of 6: pretrained, review, seed 0 ===="
    assert lines[2] == "==== 3 of 6: promot, review, learning_rate 0.01, seed 0; about 4 min left ===="
    fake.run(one)
    assert fake.trained == []


def test_archived_cells_are_not_run_again(fake: Fake, tmp_path: Path) -> None:
    """A new machine has the archive alone: it runs the cells that are new, and reports all."""
    archive, rates = tmp_path / "archive", {"learning_rate": (1e-3, 1e-2)}
    fake.run(grid(tmp_path / "old", ("prompt_tuning", "finetune"), varied=rates), archive=archive)
    kept = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file())
    cells = ("finetune/learning_rate_0.001", "finetune/learning_rate_0.01", "prompt_tuning")
    assert kept == [f"{cell}/seed_0.json.gz" for cell in cells]
    written = (archive / kept[2]).read_bytes()
    cell = json.loads(gzip.decompress(written))
    assert (
        cell["run"]["method"] == "prompt_tuning" and "samples" not in cell["run"] and cell["settings"] == {"rate": 0.1}
    )
    new = grid(tmp_path / "new", ("prompt_tuning", "finetune", "promot"), varied=rates)
    fake.run(new, archive=archive)
    assert fake.trained == [
        "promot/learning_rate_0.001/seed_0/stage1",  # the archived run of prompt tuning left none
        "promot/learning_rate_0.001/seed_0/stage2",
        "promot/learning_rate_0.01/seed_0/stage2",  # behind that of the cell before
    ]
    assert set(read_comparison(new.workdir).methods) == {"prompt_tuning", "finetune", "promot"}
    assert (archive / "promot/learning_rate_0.01/seed_0.json.gz").is_file()
    assert (archive / kept[2]).read_bytes() == written


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_a_damaged_archive_is_one_sentence(fake: Fake, tmp_path: Path, content: bytes | None) -> None:
    archive = tmp_path / "archive"
    (archive / "finetune").mkdir(parents=True)
    damaged = b"{}" if content is None else gzip.compress(content)
    (archive / "finetune/seed_0.json.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"seed_0.json.gz' .*restore it from the repository, or delete it"):
        fake.run(grid(tmp_path / "new", ("finetune",)), archive=archive)
    assert not fake.trained


def test_a_report_alone_needs_no_model(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.run(grid(tmp_path / "old", ("finetune",)), archive=tmp_path / "archive")
    fake.opened.clear()
    fake.run(grid(tmp_path / "new", ("finetune", "promot")), archive=tmp_path / "archive", run_cells=False)
    assert not fake.opened and not fake.trained
    states = {cell.method: cell.state for cell in read_comparison(tmp_path / "new").cells}
    assert states == {"finetune": "finished", "promot": "missing"}
    assert (tmp_path / "new/report.html").is_file() and "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("links", [True, False])
def test_a_shared_stage_is_there_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    donor, cell = tmp_path / "donor", tmp_path / "cell"
    (donor / "stage1/checkpoints/4").mkdir(parents=True)
    (donor / "stage1/checkpoints/4/state").write_text("rows")
    share_stage(donor, cell, "stage1")
    assert not cell.exists()  # not finished
    stage_folder.record(donor / "stage1", stage_record("stage1"))
    (cell / ".stage1.killed/stage1").mkdir(parents=True)

    def link(source: str, target: str) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", link)
    share_stage(donor, cell, "stage1")
    assert [path.name for path in cell.iterdir()] == ["stage1"]
    assert (cell / "stage1/checkpoints/4/state").read_text() == "rows"
    assert ((donor / "stage1/stage.json").stat().st_nlink == 2) == links
    (cell / "stage1/stage.json").unlink()  # begun by the cell itself: to be gone on with
    share_stage(donor, cell, "stage1")
    assert not (cell / "stage1/stage.json").exists()


def on_tiny(one: Grid, task: str) -> Grid:
    """The grid on a task that is registered."""
    return dataclasses.replace(one, experiment=dataclasses.replace(EXPERIMENT, task=task))


def test_prompts_of_several_tasks_are_trained_once(fake: Fake, tmp_path: Path) -> None:
    one = on_tiny(grid(tmp_path, ("multitask_promot",), varied={"learning_rate": (1e-3, 1e-2)}), "tiny_pair")
    fake.run(one)
    assert fake.trained == [
        "multitask_promot/learning_rate_0.001/seed_0/stage1/tiny_review",
        "multitask_promot/learning_rate_0.001/seed_0/stage1/tiny_size",
        "multitask_promot/learning_rate_0.001/seed_0/stage2",
        "multitask_promot/learning_rate_0.01/seed_0/stage2",
    ]


@pytest.mark.parametrize("trained", [(), ("tiny_review",), ("tiny_review", "tiny_size")])
def test_prompts_of_several_tasks_are_waited_for(fake: Fake, tmp_path: Path, trained: tuple[str, ...]) -> None:
    one = on_tiny(grid(tmp_path, ("multitask_promot",), varied={"learning_rate": (1e-3, 1e-2)}), "tiny_pair")
    elsewhere(tmp_path / "multitask_promot/learning_rate_0.001/seed_0")
    for task in trained:
        folder = tmp_path / "multitask_promot/learning_rate_0.001/seed_0/stage1" / task
        stage_folder.record(folder, stage_record("stage1"))
    fake.run(one, wait=False)
    assert fake.trained == (["multitask_promot/learning_rate_0.01/seed_0/stage2"] if len(trained) == 2 else [])


def test_what_cannot_be_is_said_at_once(fake: Fake, tmp_path: Path) -> None:
    one = on_tiny(grid(tmp_path, ("finetune", "multitask_promot", "replay", "freeze")), "tiny_review")
    with pytest.raises(UserError, match=r"'tiny_review' is a single one.*value for 'replay'.*value for 'freeze'"):
        fake.run(one)
    tuning = dataclasses.replace(TUNING, settings={"replay": Replay("tiny_texts"), "freeze": ("embed",)})
    with pytest.raises(UserError, match="did you mean 'tiny_text'"):
        fake.run(dataclasses.replace(one, methods=("finetune", "replay"), tuning=tuning))
    assert fake.trained == [] and not list(tmp_path.iterdir())


def test_baselines_that_begin_alike_share_it(fake: Fake, tmp_path: Path) -> None:
    fake.run(grid(tmp_path, ("finetune", "wise_ft", "l2sp")))
    assert fake.trained == ["finetune/seed_0/finetune", "wise_ft/seed_0/wise_ft", "l2sp/seed_0/l2sp"]


def test_settings_are_chosen_on_the_validation_split(fake: Fake, tmp_path: Path) -> None:
    one = grid(tmp_path, ("pretrained", "finetune", "promot"), seeds=(0, 1), varied=RATES)
    fake.run(one)
    found = read_comparison(tmp_path)
    assert found == outcomes.collect(one, 600.0)["review"]
    chosen = {method: choice.chosen for method, choice in found.selection.items()}
    assert chosen == {  # the gentler of equals
        "finetune": {"learning_rate": 1e-2},
        "promot": {"prompt_learning_rate": 0.1, "learning_rate": 1e-2},
    }
    tried = found.selection["finetune"].candidates
    assert [one.seeds for one in tried] == [
        {"0": pytest.approx(89.91), "1": pytest.approx(90.91)},
        {"0": 90, "1": 91},
    ]
    assert [one.validation for one in tried] == [pytest.approx(90.41), 90.5]
    assert {name: len(members) for name, members in found.methods.items()} == {
        "pretrained": 2, "finetune": 2, "promot": 2,
    }  # fmt: skip
    others = [(run.method, run.varied, run.seed) for run in found.others]
    assert others[:2] == [("finetune", {"learning_rate": 1e-3}, 0), ("finetune", {"learning_rate": 1e-3}, 1)]
    assert len(others) == 2 * (1 + 3) and all(varied != chosen[method] for method, varied, _ in others)
    assert len(found.cells) == 2 * (1 + 2 + 4) and {cell.state for cell in found.cells} == {"finished"}
    spread = found.spread["best"]["finetune"]["1"]
    assert (spread.mean, spread.low, spread.high, spread.seeds, spread.draws) == (40.5, 40, 41, 2, 3)
    assert spread.sd_draws == pytest.approx(1.0) and spread.sd_seeds == pytest.approx(0.5**0.5)
    report = (tmp_path / "report.md").read_text("utf-8")
    page = (tmp_path / "report.html").read_text("utf-8")
    for words in ("Settings tried", "Seeds and exemplars"):
        assert f"## {words}" in report and words in page


@pytest.mark.parametrize(("margin", "chosen"), [(0.0, 0.5), (0.5, 1.0), (1.5, 2.0), (2.0, 1.0)])
def test_settings_are_chosen_by_icl_within_the_margin(fake: Fake, tmp_path: Path, margin: float, chosen: float) -> None:
    one = grid(
        tmp_path, ("finetune", "l2sp"), seeds=(0, 1), varied={"l2sp_weight": (0.5, 1.0, 2.0, 4.0)}, margin=margin
    )
    fake.broken = {"l2sp/l2sp_weight_2.0/seed_1": TrainingError("not finite")} if margin == 2.0 else {}
    with pytest.raises(TrainingError) if fake.broken else contextlib.nullcontext():
        fake.run(one)
    found = read_comparison(tmp_path)
    assert found.selection.keys() == {"l2sp"} and found.selection["l2sp"].chosen == {"l2sp_weight": chosen}
    first = found.selection["l2sp"].candidates[0]
    assert (first.validation, first.icl) == (pytest.approx(89.901), 52.5)
    report = (tmp_path / "report.md").read_text("utf-8")
    assert f"| L2-SP | l2sp_weight {chosen:g} | {90.401 - chosen:.1f} | {47.5 + 10 * chosen:.1f} | 2 | yes |" in report
    assert (f"at most {margin:g} points below the highest target score" in report) == (margin > 0)


def test_every_task_has_a_report(fake: Fake, tmp_path: Path) -> None:
    fake.run(grid(tmp_path, ("finetune", "finetune_1shot"), tasks={"rte": {}, "snli": {}}))
    for task in ("rte", "snli"):
        methods = read_comparison(tmp_path / task).methods
        assert list(methods) == ["finetune", "finetune_1shot"]
        assert [run.target.task for members in methods.values() for run in members] == [task, task]
        assert "fine-tuning + 1-shot" in (tmp_path / task / "report.md").read_text("utf-8")
    assert not (tmp_path / "results.json").exists()
    assert fake.opened == ["rte", "rte_1shot", "snli", "snli_1shot"]  # whose caches are read
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Fine-tuned on rte" in page and "Fine-tuned on snli" in page


def test_the_report_is_served_while_cells_run(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses: list[str] = []
    pages: list[str] = []

    def run_method(*arguments: Any) -> None:
        addresses.extend(re.findall(r"The report, as it grows: (\S+)", capsys.readouterr().out))
        with urllib.request.urlopen(addresses[0], timeout=20) as answer:
            pages.append(answer.read().decode())
        fake.run_method(*arguments)

    monkeypatch.setattr(compare, "run_method", run_method)
    fake.workdir = tmp_path
    compare.run(grid(tmp_path, ("finetune", "promot")), True, 60.0, serve=0)
    assert "No run is finished yet" in pages[0] and "1 of 2 cells are finished" in pages[1]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(addresses[0], timeout=20)


def test_other_comparisons_of_the_same_cells(fake: Fake, tmp_path: Path) -> None:
    fake.run(grid(tmp_path, ("finetune", "promot"), seeds=(0, 1)))
    first = (tmp_path / "results.json").read_bytes()
    fake.run(grid(tmp_path, ("promot", "prompt_tuning"), report="other"))
    assert fake.trained == []
    assert (tmp_path / "results.json").read_bytes() == first
    assert list(read_comparison(tmp_path / "other").methods) == ["promot", "prompt_tuning"]


def test_analyses_of_the_cells_are_in_every_report_of_them(fake: Fake, tmp_path: Path) -> None:
    for folder in ("", "rte", "snli"):
        files.write(alignment(task=folder or "all", points=[]), tmp_path / folder / "analyses/one/results.json")
    fake.run(grid(tmp_path, ("finetune",), tasks={"rte": {}, "snli": {}}, report="other"))
    for page, tasks in (("other", ["all", "rte", "snli"]), ("other/rte", ["all", "rte"])):
        text = (tmp_path / page / "report.html").read_text("utf-8")
        assert text.count('id="alignment"') == 1 and re.findall(r"\(stage2 on (\w+), seed 0\)", text) == tasks


def test_a_cell_that_diverges_stops_no_other(fake: Fake, tmp_path: Path) -> None:
    one = grid(tmp_path, ("finetune", "promot"), varied={"learning_rate": (1e-3, 1e-2)})
    fake.broken = {"finetune/learning_rate_0.01/seed_0": TrainingError("the loss is not finite at step 3")}
    with pytest.raises(TrainingError, match=r"1 of 4 cells failed.*learning_rate 0.01, seed 0: the loss"):
        fake.run(one)
    found = read_comparison(tmp_path)
    states = {cell.folder: cell.state for cell in found.cells}
    assert states.pop("finetune/learning_rate_0.01/seed_0") == "failed" and set(states.values()) == {"finished"}
    assert found.selection["finetune"].chosen == {"learning_rate": 1e-3}  # although 0.01 would have been better
    assert found.selection["finetune"].candidates[1] == results.Candidate(varied={"learning_rate": 0.01}, seeds={})
    fake.broken.clear()  # the failure lasts: it would end in the same way
    with pytest.raises(TrainingError, match="1 of 4 cells failed"):
        fake.run(one)
    assert fake.trained == []
    (tmp_path / "finetune/learning_rate_0.01/seed_0/failed.json").unlink()
    fake.run(one)
    assert fake.trained == ["finetune/learning_rate_0.01/seed_0/finetune"]
    assert {cell.state for cell in read_comparison(tmp_path).cells} == {"finished"}


def test_a_cell_that_broke_is_tried_again_next_time(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = grid(tmp_path, ("finetune", "promot"))
    fake.broken = {"finetune/seed_0": MemoryError("out of memory")}
    with pytest.raises(TrainingError, match="MemoryError: out of memory"):
        fake.run(one)
    assert "in run_method" in capsys.readouterr().err  # the whole traceback
    fake.broken.clear()
    fake.run(one)
    assert fake.trained == ["finetune/seed_0/finetune"]
    assert not (tmp_path / "finetune/seed_0/failed.json").exists()


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"settings": 1}', "{"])
def test_a_failure_that_says_nothing_is_none(fake: Fake, tmp_path: Path, text: str) -> None:
    (tmp_path / "finetune/seed_0").mkdir(parents=True)
    (tmp_path / "finetune/seed_0/failed.json").write_text(text)
    fake.run(grid(tmp_path, ("finetune",)))
    assert fake.trained == ["finetune/seed_0/finetune"]


@pytest.mark.parametrize(
    "error",
    [
        HostError("Waited 600 s for host 1"),
        StorageError("Cannot save a checkpoint"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=["host", "checkpoint", "file"],
)
def test_what_all_cells_would_meet_is_no_failure_of_one(fake: Fake, tmp_path: Path, error: Exception) -> None:
    """A host that does not come, a full disk: the comparison ends, and goes on with that cell next time."""
    fake.broken = {"finetune/seed_0": error}
    with pytest.raises(type(error)):
        fake.run(grid(tmp_path, ("finetune", "promot")))
    assert fake.trained == [] and not list((tmp_path / "finetune/seed_0").iterdir())


def test_what_is_written_last_is_all_that_is_there(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, write = grid(tmp_path, ("finetune", "promot")), files.write
    fake.workdir = tmp_path
    others = ["promot"]  # finished and reported by another process while this one is about to write

    def slow(found: Any, path: Path) -> Path:
        for method in [others.pop()] if others else []:
            fake.run_method(EXPERIMENT, tmp_path / method / "seed_0", method, TUNING)
            outcomes.publish(one, 600.0)
        return write(found, path)

    fake.run_method(EXPERIMENT, tmp_path / "finetune/seed_0", "finetune", TUNING)
    monkeypatch.setattr(files, "write", slow)
    outcomes.publish(one, 600.0)
    assert list(read_comparison(tmp_path).methods) == ["finetune", "promot"]


def test_bad_input_ends_the_comparison(fake: Fake, tmp_path: Path) -> None:
    fake.broken = {"finetune/seed_0": UserError("was started with other settings")}
    with pytest.raises(UserError, match="other settings"):
        fake.run(grid(tmp_path, ("finetune", "promot")))
    assert fake.trained == [] and not list((tmp_path / "finetune/seed_0").iterdir())
    with pytest.raises(UserError, match=r"STALE is 0\.0"):
        fake.run(grid(tmp_path, ("finetune",)), stale=0.0)


def elsewhere(folder: Path, age: float = 0.0) -> Path:
    """A lease of another machine."""
    folder.mkdir(parents=True)
    lease = folder / "lease.0"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process": "x"}))
    os.utime(lease, (time.time() - age,) * 2)
    return lease


def test_cells_of_other_machines_are_left_to_them(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = grid(tmp_path, ("prompt_tuning", "promot", "finetune"))
    elsewhere(tmp_path / "prompt_tuning/seed_0")
    fake.run(one, wait=False)
    assert fake.trained == ["finetune/seed_0/finetune"]  # ProMoT waits for the prompt that is being trained there
    shown = capsys.readouterr().out
    assert "Left to other processes: prompt_tuning, review, seed 0 (elsewhere, process 1), promot" in shown
    found = read_comparison(tmp_path)
    assert [cell.state for cell in found.cells] == ["running", "missing", "finished"]
    assert list(found.methods) == ["finetune"]
    assert "1 of 3 cells are finished, 1 running." in (tmp_path / "report.html").read_text("utf-8")
    assert "prompt_tuning/seed_0 is running" in (tmp_path / "report.md").read_text("utf-8")


def test_a_dead_machines_cell_is_taken_over(fake: Fake, tmp_path: Path) -> None:
    elsewhere(tmp_path / "finetune/seed_0", age=100)
    fake.run(grid(tmp_path, ("finetune",)))
    assert fake.trained == ["finetune/seed_0/finetune"]


def test_waits_for_cells_of_other_machines(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = grid(tmp_path, ("prompt_tuning", "promot"))
    lease = elsewhere(tmp_path / "prompt_tuning/seed_0")
    fake.workdir = tmp_path

    def finish(seconds: float) -> None:
        if seconds == 3.0 and lease.exists():  # other threads sleep too
            fake.run_method(EXPERIMENT, tmp_path / "prompt_tuning/seed_0", "prompt_tuning", TUNING)
            lease.unlink()

    monkeypatch.setattr(compare.time, "sleep", finish)
    fake.run(one)
    assert fake.trained == ["prompt_tuning/seed_0/stage1", "promot/seed_0/stage2"]
    assert (
        "Waiting for other processes: prompt_tuning, review, seed 0 (elsewhere, process 1), promot"
        in capsys.readouterr().out
    )
    assert {cell.state for cell in read_comparison(tmp_path).cells} == {"finished"}


def test_a_wait_ends_when_the_machine_is_taken_away(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path / "finetune/seed_0")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # other threads sleep too
        waits.append(seconds)
        if len(waits) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(waits) <= 20

    monkeypatch.setattr(compare.time, "sleep", sleep)
    with preemption.heeded(), pytest.raises(PreemptedError):
        fake.run(grid(tmp_path, ("finetune",)), stale=600.0)
    assert set(waits) == {5.0}


def test_only_one_host_looks_for_owners(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide, owner, depth = hosts.decide, compare.owner, [0]

    def deciding(function: Any, what: str) -> Any:
        depth[0] += 1
        found = decide(function, what)
        depth[0] -= 1
        return found

    def asked(*arguments: Any) -> str:
        assert depth[0]
        return owner(*arguments)

    monkeypatch.setattr(hosts, "decide", deciding)
    monkeypatch.setattr(compare, "owner", asked)
    monkeypatch.setattr(outcomes, "collect", lambda *arguments: {})  # what is reported, host 0 alone looks up
    elsewhere(tmp_path / "finetune/seed_0")
    fake.run(grid(tmp_path, ("finetune",)), wait=False)


# ---- a real one ------------------------------------------------------------------------------------------------------


def test_tasks_and_rates_on_a_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    train, workdir = runs.train, tiny_folder / "compare"

    def count(folder: Path, *args: Any, **kwargs: Any) -> Any:
        trained.append(folder.relative_to(workdir).as_posix())
        return train(folder, *args, **kwargs)

    monkeypatch.setattr(runs, "train", count)
    macros: dict[str, object] = {"METHODS": '("prompt_tuning", "promot")', "SEEDS": (0,), "EXEMPLAR_DRAWS": 2}
    macros |= {"LEARNING_RATES": {"model": (1e-3, 1e38)}, "TRAIN_STEPS": 2, "PROMPT_TRAIN_STEPS": 2}
    macros |= {"TASKS": {"tiny_size": {"inputs": 24, "targets": 7}}, "Evaluation.shots": "(1,)"}
    assert main.main(tiny.command(tiny_folder, "compare.gin", workdir, **macros)) == 1
    rates = ("0.001", "1e+38")
    assert trained == [
        "tiny_size/prompt_tuning/seed_0/stage1",
        *(f"tiny_size/promot/learning_rate_{rate}/seed_0/stage2" for rate in rates),
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("1 of 3 cells failed") and "not finite at step" in line

    whole = (workdir / "report.md").read_text("utf-8")
    assert "## tiny" in whole and "](tiny_size/report.md)" in whole and "### At matched target score" in whole
    report = (workdir / "tiny_size/report.md").read_text("utf-8")
    assert report.index("## Frontier") < report.index("## Paired differences") < report.index("## Scores")
    assert "| ProMoT - prompt tuning |" in report and "| 1: examples only |" in report
    found = read_comparison(workdir / "tiny_size")
    prompt, promot = (found.methods[name][0] for name in ("prompt_tuning", "promot"))
    assert [point for point in promot.curve if point.stage == "stage1"] == prompt.curve
    assert [len(point.draws) for point in promot.curve if point.stage == "stage2"] == [2, 2]
    one, other = promot.icl["1"].draws
    assert one.norm_avg == promot.icl["1"].norm_avg
    outputs = workdir / "tiny_size/promot/learning_rate_0.001/seed_0/outputs/icl_1shot.jsonl"
    rows = [json.loads(line) for line in outputs.read_text("utf-8").splitlines()]
    first, second = ([row for row in rows if row["draw"] == draw] for draw in (0, 1))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert all(a["input"] != b["input"] for a, b in zip(first, second, strict=True))  # other exemplars
    assert other.tasks.keys() == one.tasks.keys() == {"tiny_colour", "tiny_size"}
    assert list(promot.example_scores) == ["target", "icl_1shot", "icl_1shot/draw_1"]
    assert promot.target and _mean(promot.example_scores["target"]["tiny_size"]) == pytest.approx(promot.target.score)
    for name, draw in (("icl_1shot", one), ("icl_1shot/draw_1", other)):
        means = {task: pytest.approx(_mean(scores)) for task, scores in promot.example_scores[name].items()}
        assert draw.tasks == means
        for task, scores in promot.example_scores[name].items():
            same = prompt.example_scores[name][task]
            assert (scores.examples, scores.prompts) == (same.examples, same.prompts)
    last = promot.curve[-1]
    assert list(last.example_scores) == list(promot.example_scores)
    assert _mean(last.example_scores["target"]["tiny_size"]) == pytest.approx(last.target)
    assert not prompt.curve[-1].example_scores  # its stage leaves the model as it was


def _mean(scores: ExampleScores) -> float:
    values = scores.values()
    assert values is not None
    return float(values.mean())


def test_layers_that_are_not_there_are_said_before_anything_is_trained(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tiny_folder / "frozen"
    macros: dict[str, object] = {"METHODS": '("finetune", "freeze")', "STRENGTHS": {"freeze": (1, 9)}}
    assert main.main(tiny.command(tiny_folder, "compare.gin", workdir, **macros)) == 2
    assert "layers_2/.*' matches no parameter" in capsys.readouterr().err
    assert not list(workdir.rglob("checkpoints"))


def test_the_job_hands_its_settings_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got: list[Any] = []
    monkeypatch.setattr(compare, "run", lambda *arguments: got.append(arguments))
    rates, strengths = {"model": (0.1,)}, {"l2sp": (0.1, 1.0)}
    chosen: dict[str, Any] = {"learning_rates": rates, "strengths": strengths, "margin": 1.0, "report": "all"}
    jobs.compare(tmp_path, EXPERIMENT, TUNING, ("finetune",), seeds=3, wait=False, stale=5.0, **chosen)
    ((one, wait, stale, serve, archive, run_cells),) = got
    wanted = grid(
        tmp_path,
        ("finetune",),
        seeds=[3],
        varied={"learning_rate": (0.1,), "l2sp_weight": (0.1, 1.0)},
        margin=1.0,
        report="all",
    )
    assert one == dataclasses.replace(wanted, methods=["finetune"])
    assert (wait, stale, serve, archive, run_cells) == (False, 5.0, None, None, True)
    with pytest.raises(UserError, match="name learning_rate twice"):
        jobs.compare(
            tmp_path, EXPERIMENT, TUNING, ("finetune",), learning_rates=rates, varied={"learning_rate": (1.0,)}
        )


def test_a_setting_without_a_score_is_behind_those_that_have_one() -> None:
    def candidate(rate: float, validation: float | None, icl: float | None) -> results.Candidate:
        return results.Candidate(
            varied={"learning_rate": rate}, validation=validation, icl=icl, seeds={"0": validation}
        )

    low, none, tied = candidate(0.1, 0.5, None), candidate(0.2, None, 90.0), candidate(0.3, 0.5 - 1e-12, 1.0)
    assert outcomes._best([none, low], 2.0) == 1 and outcomes._best([none, none], 2.0) == 0
    assert outcomes._best([low, tied], 0.0) == 1  # of equals the higher ICL
    assert outcomes._best([tied, low, replace(low, seeds={"0": 0.5, "1": 0.4})], 2.0) == 2


@pytest.mark.slow
def test_processes_share_the_cells(tiny_folder: Path) -> None:
    """One is killed in its first cell; two that start together then do what is left, each cell once."""
    macros: dict[str, object] = {"METHODS": '("prompt_tuning", "promot", "finetune")', "SEEDS": (0,)}
    macros |= {"TRAIN_STEPS": 2, "PROMPT_TRAIN_STEPS": 2, "STALE": 30.0, "Evaluation.shots": "(1,)"}
    command = tiny.command(tiny_folder, "compare.gin", tiny_folder / "shared", **macros)
    log = tiny_folder / "shared.log"
    killed = start(command, log)
    assert killed.stdout is not None
    assert any(line.startswith("[stage1] trains") for line in killed.stdout)
    killed.kill()
    killed.communicate()
    assert list((tiny_folder / "shared").rglob("lease.0"))

    both = [start(command, log) for _ in range(2)]
    said = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], log.read_text()
    for stage in ("stage1", "stage2", "finetune"):
        assert sum(text.count(f"[{stage}] trains") for text in said) == 1, said
    assert not list((tiny_folder / "shared").rglob("lease.*"))
    found = read_comparison(tiny_folder / "shared")
    assert [cell.state for cell in found.cells] == ["finished"] * 3
