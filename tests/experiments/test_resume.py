"""A run that is killed at any moment goes on with the same command, to bitwise the same end."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import compilation
import pytest
import tiny
from resumed import check_same, start

from promot_jax import main
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.distributed import preemption
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.evaluation.sampler import Sampler

STEPS = 9
CELL = "promot/seed_0"  # of the comparison that runs both stages
ROOT = Path(__file__).parents[2]
# Everything whose state has to come back: dropout keys, packed batches, both optimizers, accumulated gradients. Without
# dropout, in stage 2, examples of a batch share rows.
GIN = f"""\
TRAIN_STEPS = {STEPS}
PROMPT_TRAIN_STEPS = {STEPS}
compare.methods = ("promot",)
prompt/Training.dropout_rate = 0.1
prompt/Training.pack = True
prompt/Optimizer.name = "adafactor"
model/Training.microbatches = 2
model/Optimizer.schedule = "cosine"
model/Optimizer.warmup_steps = 3
Evaluation.shots = (1,)
"""


class Moment(NamedTuple):
    """When a run is killed: so many seconds after it has reported a step of a stage."""

    stage: str
    step: int
    delay: float

    def __str__(self) -> str:
        return f"{self.stage}, step {self.step} and {self.delay:.2f} s"


def moments(stages: tuple[str, ...], seed: int) -> list[Moment]:
    """One random moment per entry of `stages`."""
    draw = random.Random(seed)
    return [Moment(stage, draw.randrange(STEPS), draw.uniform(0, 0.3)) for stage in stages]


def kill(process: subprocess.Popen[str], moment: Moment, log: Path) -> None:
    """Kills a run at a moment, which it must not outlive."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        found = re.match(r"\[(\w+)\] (?:step )?(\d+)", line)
        if found and (found[1], int(found[2])) >= moment[:2]:
            time.sleep(moment.delay)
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, said + log.read_text()


def command(folder: Path, workdir: Path, gin_file: str = "demo.gin", **macros: object) -> list[str]:
    (folder / "resume.gin").write_text(GIN)
    return [*tiny.command(folder, gin_file, workdir, **macros), f"--gin_file={folder / 'resume.gin'}"]


@pytest.fixture(name="reference", scope="module")
def _reference(tiny_folder: Path) -> Path:
    """A run of both stages that nobody interrupted."""
    assert main.main(command(tiny_folder, tiny_folder / "reference")) == 0
    return tiny_folder / "reference"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, id=str(moment))
        for moment in moments(("stage1", "stage1", "stage2", "stage2", "stage2"), seed=5)
    ],
)
def test_killed_run_goes_on(tiny_folder: Path, reference: Path, tmp_path: Path, moment: Moment) -> None:
    workdir, log = tmp_path / "run", tmp_path / "log"
    kill(start(command(tiny_folder, workdir), log), moment, log)
    assert not (workdir / "results.json").exists()
    assert main.main(command(tiny_folder, workdir)) == 0
    check_same(workdir, reference)


@pytest.mark.parametrize(
    "missing",
    [
        ["results.json", "outputs"],
        ["results.json", "stage2/stage.json"],
        ["results.json", "stage2", "stage1/stage.json", "stage1/prompt"],
        ["results.json", "stage2/stage.json", "stage2/checkpoints/9", "stage2/outputs/step_000009.jsonl"],
    ],
    ids=["final evaluation", "end of stage 2", "end of stage 1", "last checkpoint"],
)
def test_what_is_missing_is_made_again(tiny_folder: Path, reference: Path, tmp_path: Path, missing: list[str]) -> None:
    """Moments that last too short to be hit by chance."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "results.json").unlink()
    for path in [workdir / CELL / name for name in missing]:
        assert path.exists()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main.main(command(tiny_folder, workdir)) == 0
    check_same(workdir, reference)


def test_interrupted_run_goes_on_among_remains(
    tiny_folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at step 6 of stage 2; and beside the checkpoint of step 4, one half written and one half deleted."""
    workdir = tmp_path / "run"
    checkpoints = workdir / CELL / "stage2" / "checkpoints"
    save = Checkpoints.save

    def interrupt(self: Checkpoints, step: int, *args: Any) -> None:
        self.wait()
        if step == 6 and self.folder == checkpoints:
            raise KeyboardInterrupt
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupt)
        assert main.main(command(tiny_folder, workdir)) == 130
    assert [path.name for path in checkpoints.iterdir()] == ["4"]
    shutil.copytree(checkpoints / "4", checkpoints / "6.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / "4" / "state", checkpoints / "2" / "state")
    (workdir / ".results.json.abc").write_text("{")
    assert main.main(command(tiny_folder, workdir)) == 0
    check_same(workdir, reference)


def test_preempted_run_goes_on(
    tiny_folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped again and again, ever later: at steps, in evaluations, before the first and in the closing one."""
    workdir = tmp_path / "run"
    said: list[str] = []
    for patience in itertools.count(1, 4):
        left = iter(range(patience))
        monkeypatch.setattr(preemption, "stops", lambda left=left: next(left, None) is None)
        if main.main(command(tiny_folder, workdir)) == 0:
            break
        said += [str(path.relative_to(workdir / CELL)) for path in (workdir / CELL).glob("*/preempted/*")]
    assert len(said) > 3 and {name.split("/")[0] for name in said} == {"stage1", "stage2"}
    assert not list(workdir.rglob("preempted"))
    check_same(workdir, reference)


@pytest.mark.parametrize(
    ("evaluation", "sent", "status", "word"),
    [
        pytest.param(False, signal.SIGTERM, 75, "preempted", marks=pytest.mark.slow, id="a step"),
        pytest.param(True, signal.SIGTERM, 75, "preempted", marks=pytest.mark.slow, id="an evaluation"),
        pytest.param(True, signal.SIGINT, 130, "interrupted", id="Ctrl-C in an evaluation"),
    ],
)
def test_preempted_run_says_where_it_stands(
    tiny_folder: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    evaluation: bool,
    sent: signal.Signals,
    status: int,
    word: str,
) -> None:
    """A signal at step 3 of stage 2, or while step 4 is evaluated; a checkpoint of either is never the best one."""
    workdir = tmp_path / "run"
    stage = workdir / CELL / "stage2"
    name, step = ("stream", 4) if evaluation else ("batch", 3)
    owner: Any = Sampler if evaluation else Partitioner
    real, told = getattr(owner, name), []

    def signalled(self: Any, *args: Any) -> Any:
        found = real(self, *args)
        if (stage / "outputs" / "step_000002.jsonl").exists():
            if not told:
                os.kill(os.getpid(), sent)  # once: the second Ctrl-C ends it by force
            told.append(sent)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert main.main(command(tiny_folder, workdir)) == status
    assert f"[stage2] {word}; the state of step {step} is saved. The same command" in capsys.readouterr().err
    assert [path.name for path in (stage / "preempted").iterdir()] == [str(step)]
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["2"]
    assert main.main(command(tiny_folder, workdir)) == 0
    assert f"[stage2] resumes from step {step} in {stage / 'preempted'}." in capsys.readouterr().out
    assert not (stage / "preempted").exists()
    check_same(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_five_moments_of_each_stage_in_processes_of_their_own(tmp_path: Path, stage: str) -> None:
    """As a user would do it: every start a fresh process, compiling as always; then killed five times in one run."""
    tiny.workspace(tmp_path)
    log = tmp_path / "log"

    def run(gin_file: str, workdir: Path, moment: Moment | None, **macros: object) -> Path:
        process = start(command(tmp_path, workdir, gin_file, **macros), log, **compilation.AS_USERS)
        if moment:
            kill(process, moment, log)
        else:
            process.communicate()
            assert process.returncode == 0, log.read_text()
        return workdir

    macros: dict[str, object] = {}
    if stage == "stage2":
        macros["PROMPT_PATH"] = run("promot_stage1.gin", tmp_path / "prompt", None)
    gin_file = f"promot_{stage}.gin"
    reference = run(gin_file, tmp_path / "reference", None, **macros)
    chosen = moments((stage,) * 5, seed=11)
    for index, moment in enumerate(chosen):
        run(gin_file, tmp_path / f"{index}", moment, **macros)
        check_same(run(gin_file, tmp_path / f"{index}", None, **macros), reference)
    for moment in sorted(chosen):
        run(gin_file, tmp_path / "again", moment, **macros)
    check_same(run(gin_file, tmp_path / "again", None, **macros), reference)
