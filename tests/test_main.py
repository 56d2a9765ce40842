"""The entry point: gin files and flags in, one job called, or one error message and a status out."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from promot_jax import main
from promot_jax.config import gin_files
from promot_jax.errors import TrainingError, UserError
from promot_jax.sweep import leases

ROOT = Path(__file__).parents[1]
CALLS: list[dict[str, Any]] = []


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A setting within a setting."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    rate: float = 0.3
    betas: tuple[float, ...] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A frozen dataclass with defaults, as the library has them."""

    steps: int
    optimizer: Optimizer = Optimizer()
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        if self.steps < 0:
            raise UserError(f"steps has to be positive, not {self.steps}.")


def train(workdir: Path, stage: Stage, other: Stage | None = None, task: str = "sentiment", fail: str = "") -> None:
    """Notes its arguments, or fails as asked."""
    CALLS.append({"workdir": workdir, "stage": stage, "other": other, "task": task})
    if fail == "training":
        raise TrainingError("The loss is NaN at step 7; the last good checkpoint is step 5.")
    if fail == "interrupt":
        raise KeyboardInterrupt
    if fail == "bug":
        raise ZeroDivisionError("a bug")
    if fail == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir / "results.json"))
    if fail == "pipe":
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    if fail == "library":
        raise TimeoutError("not the system's")
    (workdir / "results.json").write_text("{}")


BASE = """\
# python -m promot_jax.main --gin_file=base.gin
run.job = @train
train.stage = @first/Stage()
train.task = %TASK
first/Stage.steps = %STEPS
Stage.optimizer = @Optimizer()
Stage.lengths = {'inputs': 64}
first/Optimizer.rate = 0.1
Optimizer.name = 'adamw'
TASK = 'sentiment'
STEPS = %DEFAULT_STEPS
DEFAULT_STEPS = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose gin folder holds base.gin and whose names are those of this file; we stand elsewhere."""
    gin_folder = tmp_path / "package_gin"
    (gin_folder / "models").mkdir(parents=True)
    (gin_folder / "base.gin").write_text(BASE)
    (gin_folder / "models" / "small.gin").write_text("# A small model.\ntrain.task = %MODEL_TASK\nMODEL_TASK = 'x'\n")
    monkeypatch.setattr(gin_files, "folder", lambda: gin_folder)
    here = {name: f"{__name__}:{name}" for name in ("train", "Stage", "Optimizer")}
    monkeypatch.setattr(main, "CONFIGURABLES", here)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    CALLS.clear()
    return gin_folder


def error(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """Returns the one line that `argv` leaves on stderr, with `status`."""
    assert main.main(argv) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def with_line(folder: Path, *lines: str) -> str:
    """Writes a gin file that includes base.gin and adds lines; returns its name."""
    (folder / "mine.gin").write_text("\n".join(["include 'base.gin'", *lines, ""]))
    return "--gin_file=mine.gin"


def test_job_gets_what_the_file_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--gin_file=base.gin"]) == 0
    (call,) = CALLS
    assert call["workdir"] == Path("runs/base")
    assert call["stage"] == Stage(5, Optimizer("adamw", 0.1), {"inputs": 64})
    assert type(call["stage"]) is Stage and call["other"] is None and call["task"] == "sentiment"
    out = capsys.readouterr().out
    assert "runs/base" in out and "results.json" in out and "operative_config.gin" in out


def test_library_class_is_untouched() -> None:
    main.main(["--gin_file=base.gin"])
    assert Stage(3).optimizer == Optimizer()  # gin's bindings reach only what gin builds
    assert Stage(3).lengths == {}


def test_overrides_and_later_files_win(folder: Path) -> None:
    (folder / "more.gin").write_text("first/Stage.steps = 9\nTASK = 'sarcasm'\n")
    both = ["--gin_file=base.gin", "--gin_file=more.gin"]
    assert main.main([*both, "--gin.DEFAULT_STEPS=1"]) == 2  # nothing uses it any more
    assert main.main([*both, "--gin.first/Optimizer.rate=2", "--workdir=there"]) == 0
    assert CALLS[-1]["stage"].steps == 9 and CALLS[-1]["task"] == "sarcasm" and CALLS[-1]["stage"].optimizer.rate == 2
    assert CALLS[-1]["workdir"] == Path("there")
    assert main.main(both) == 0
    assert CALLS[-1]["workdir"] == Path("runs/base-more")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("a/b c-d.json", "a/b c-d.json"),
        ("promot_jax.tasks.x", "promot_jax.tasks.x"),
        ("", ""),
        ("'quoted'", "quoted"),
        ('"3"', "3"),
        ("a=b", "a=b"),
        ("3 shots", "3 shots"),
        ("007", "007"),
        ("-", "-"),
        ("it's", "it's"),
    ],
)
def test_strings_need_no_quotes(text: str, value: str) -> None:
    assert main.main(["--gin_file=base.gin", f"--gin.TASK={text}"]) == 0
    assert CALLS[-1]["task"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("True", True),
        ("None", None),
        ("(1, 2)", (1, 2)),
        ("{'a': [1]}", {"a": [1]}),
        ("{text} Good?", "{text} Good?"),
    ],
)
def test_other_values_are_ginlike(text: str, value: object) -> None:
    setting = gin_files.read_override("X", text)
    assert setting.value == value and type(setting.value) is type(value) and gin_files.is_override(setting)


def test_lists_become_tuples_where_asked() -> None:
    assert main.main(["--gin_file=base.gin", "--gin.Optimizer.betas=[0.5, 1]"]) == 0
    assert CALLS[-1]["stage"].optimizer.betas == (0.5, 1)


def test_files_of_the_working_directory_come_first() -> None:
    Path("base.gin").write_text(BASE.replace("'sentiment'", "'mine'"))
    assert main.main(["--gin_file=base.gin"]) == 0
    assert CALLS[-1]["task"] == "mine"


def test_include_looks_beside_the_file_first(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.gin").write_text("include 'b.gin'\nTASK = 'deep'\n")
    (tmp_path / "deep" / "b.gin").write_text(BASE)
    assert main.main([f"--gin_file={tmp_path / 'deep' / 'a.gin'}"]) == 0
    assert CALLS[-1]["task"] == "deep"


def test_operative_configuration_runs_again(folder: Path) -> None:
    main.main(["--gin_file=base.gin", "--gin.DEFAULT_STEPS=8"])
    text = Path("runs/base/operative_config.gin").read_text()
    assert "DEFAULT_STEPS = 8" in text and "first/Stage.path = None" in text and "first/Optimizer.rate = 0.1" in text
    assert main.main(["--gin_file=runs/base/operative_config.gin", "--workdir=again"]) == 0
    assert CALLS[0] | {"workdir": None} == CALLS[1] | {"workdir": None}
    assert Path("again/operative_config.gin").read_text() == text
    assert main.main(["--gin_file=runs/base/config.gin"]) == 0
    assert CALLS[2] | {"workdir": None} == CALLS[1] | {"workdir": None}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--gin_file=bsae.gin"], ["'bsae.gin'", "did you mean 'base.gin'"]),
        (["--gin_file=small.gin"], ["did you mean 'models/small.gin'"]),
        (["--gin_file=base.gin", "--gin.STEP=3"], ["--gin.STEP", "did you mean 'STEPS'"]),
        (["--gin_file=base.gin", "--gin.MODEL_TASK=x"], ["--gin.MODEL_TASK", "nothing in this run uses"]),
        (["--gin_file=base.gin", "--gin.first/Stage.step=3"], ["no parameter 'step'", "did you mean 'steps'"]),
        (["--gin_file=base.gin", "--gin.Stag.steps=3"], ["'Stag'", "did you mean 'Stage'"]),
        (["--gin_file=base.gin", "--gin.frist/Stage.steps=3"], ["changes nothing", "first/Stage"]),
        (["--gin_file=base.gin", "--gin.STEPS=1O0"], ["STEPS has to be an integer, not '1O0'."]),
        (["--gin_file=base.gin", "--gin.STEPS=-3"], ["steps has to be positive, not -3 (STEPS = -3)."]),
        (["--gin_file=base.gin", "--gin.Optimizer.name=adam"], ["one of 'adafactor', 'adamw', not 'adam'"]),
        (["--gin_file=base.gin", "--gin.STEPS=[1,"], ["--gin.STEPS"]),
        (["--gin_file=base.gin", "--gin.STEPS", "3"], ["--gin.NAME=VALUE"]),
        (["--gin_file=base.gin", "--gin.train.workdir=x"], ["workdir"]),
        (["--gin_file=base.gin", "--gin.run.job=@trian"], ["'trian'", "did you mean 'train'"]),
        (["--gin_file=base.gin", "--gin.run.job=train"], ["run.job", "@train"]),
        (["--gin_file=models/small.gin"], ["run.job"]),
        (["--gin_file=base.gin", "--workdirr=x"], ["--workdirr", "did you mean 'workdir'"]),
        (["--gin_file=base.gin", "extra"], ["'extra'"]),
        (["--gin_file=base.gin", "--steps=4"], ["There is no flag --steps: settings are given as --gin.STEPS=VALUE."]),
        (["--gin_file=base.gin", "--STEPS=4"], ["There is no flag --STEPS: settings are given as --gin.STEPS=VALUE."]),
        (["--gin_file=base.gin", "STEPS=4"], ["'STEPS=4' is no flag: settings are given as --gin.STEPS=4."]),
        (["base.gin"], ["'base.gin' is no flag: give it as --gin_file=base.gin."]),
        (["--gin_file="], ["There is no gin file ''"]),
        (["--gin_file=" + "x" * 5000], ["There is no gin file"]),
        (["--gin_file=base.gin", "--start_timeout=nan"], ["seconds, not nan"]),
        (["--gin_file=base.gin", "--start_timeout=1e400"], ["start_timeout"]),
        (["--gin_file=base.gin", "--heartbeat_timeout=-1"], ["heartbeat_timeout"]),
        (["--gin_file"], ["gin_file"]),
    ],
)
def test_mistake_is_one_sentence(argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, *argv)
    assert all(part in message for part in parts), message
    assert not CALLS and not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("STEPS 3", ["mine.gin line 2"]),
        ("STEPS = three", ["mine.gin line 2", "'three'", "quotes"]),
        ("STEPS = (3,", ["mine.gin line"]),
        ("STEPS = $", ["mine.gin line 2"]),
        ("first/Stage.stepz = 3", ["mine.gin line 2", "did you mean 'steps'"]),
        ("trian.task = 'x'", ["mine.gin line 2", "did you mean 'train'"]),
        ("train.other = @second/Stagee()", ["mine.gin line 2", "did you mean 'Stage'"]),
        ("train.other = @second/Stage()", ["second/Stage needs a value for 'steps': set second/Stage.steps"]),
        ("train.task = %TAKS", ["mine.gin line 2", "TAKS has no value", "did you mean 'TASK'"]),
        ("TASK = %gin.REQUIRED", ["add --gin.TASK=VALUE"]),
        ("first/Stage.steps = %gin.REQUIRED", ["add --gin.first/Stage.steps=VALUE"]),
        ("STEP = 3", ["mine.gin line 2", "did you mean 'STEPS'"]),
        ("include 'bass.gin'", ["did you mean 'base.gin'"]),
        ("include 'mine.gin'", ["includes itself"]),
        ("import os", ["mine.gin line 2", "MIXTURE_OR_TASK_MODULE"]),
    ],
)
def test_mistake_in_a_file_names_its_line(
    folder: Path, line: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error(capsys, with_line(folder, line))
    assert all(part in message for part in parts), message


def test_file_may_set_macros_of_other_runs(folder: Path) -> None:
    assert main.main([with_line(folder, "MODEL_TASK = 'only models/small.gin uses it'")]) == 0


def test_required_macro_is_satisfied_by_the_command_line(folder: Path) -> None:
    assert main.main([with_line(folder, "TASK = %gin.REQUIRED"), "--gin.TASK=given"]) == 0
    assert CALLS[-1]["task"] == "given"


def test_failures_have_their_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = with_line(folder, "train.fail = %FAIL")
    assert "last good checkpoint is step 5" in error(capsys, flag, "--gin.FAIL=training", status=1)
    assert "resumes" in error(capsys, flag, "--gin.FAIL=interrupt", status=130)
    with pytest.raises(ZeroDivisionError, match=r"^a bug$"):  # a bug keeps its traceback, and gin adds nothing to it
        main.main([flag, "--gin.FAIL=bug"])


def test_a_second_run_in_a_workdir_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with leases.alone(tmp_path):
        assert "in use by" in error(capsys, "--gin_file=base.gin", f"--workdir={tmp_path}")
    assert main.main(["--gin_file=base.gin", f"--workdir={tmp_path}"]) == 0
    assert not list(tmp_path.glob("lease*")) and "lease" not in capsys.readouterr().out


def test_a_workdir_that_reads_as_a_pattern_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's `glob` names the characters; Orbax finds no checkpoint below such a folder."""
    for name in ("run[1]", "run?", "a*/run"):
        assert "give another workdir" in error(capsys, "--gin_file=base.gin", f"--workdir={tmp_path / name}")
    assert not CALLS and not list(tmp_path.glob("run*"))


def test_faults_of_the_system_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words are those of errno(3)."""
    flag = with_line(folder, "train.fail = %FAIL")
    said = error(capsys, flag, "--gin.FAIL=disk", status=1)
    assert "'runs/mine/results.json': No space left on device; what was saved before is whole" in said
    said = error(capsys, flag, "--gin.FAIL=pipe", status=1)
    assert "Nobody reads the output any more; give it a file to write to, and the same command resumes" in said
    with pytest.raises(TimeoutError):
        main.main([flag, "--gin.FAIL=library"])


def test_unusable_workdir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "workdir" in error(capsys, "--gin_file=base.gin", f"--workdir={tmp_path / 'file'}")


def test_usage_lists_files_with_their_headers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    text = capsys.readouterr().err
    assert "models/small.gin  A small model." in text and "--gin.NAME=VALUE" in text
    assert main.main(["--help"]) == 0
    assert capsys.readouterr().out == text


def test_help_puts_runs_first_and_says_what_they_take(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    head = (
        "# Trains a prompt.\n# on two lines.\n# Command: x\n#   more\n# Hardware: a TPU. Time: 5 min. Expected: 90.\n"
    )
    (folder / "base.gin").write_text(head + BASE.partition("\n")[2])
    main.main(["--help"])
    _, listed = capsys.readouterr().out.split("Runs:\n")
    runs, parts = listed.split("\nParts")
    assert runs == (
        "  base.gin\n      Trains a prompt.\n      on two lines.\n      Hardware: a TPU. Time: 5 min. Expected: 90.\n"
    )
    assert "models/small.gin" in parts


def test_help_of_a_run_lists_its_macros(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    flag = with_line(folder, 'TASK = "a # b"  # what it trains on')
    assert main.main([flag, "--help", "--gin.DEFAULT_STEPS=7"]) == 0
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "  TASK = 'a # b'  # what it trains on",
        "  STEPS = %DEFAULT_STEPS",
        "  DEFAULT_STEPS = 7",
    ]
    assert not CALLS and not Path("runs").exists()


def test_gin_file_needs_no_suffix() -> None:
    assert main.main(["--gin_file=base"]) == 0
    assert CALLS[-1]["workdir"] == Path("runs/base")


GIN = ROOT / "gin"
GIN_FILES = sorted(path.relative_to(GIN).as_posix() for path in GIN.rglob("*.gin"))


@pytest.fixture(name="refused", scope="module")
def _refused() -> dict[str, str]:
    """Files of the package that the code does not accept, and why; of one process, since each imports all jobs."""
    code = (
        "import json, sys\n"
        "import gin\n"
        "from promot_jax import main\n"
        "from promot_jax.config import binding, checks, gin_files\n"
        "refused = {}\n"
        "for name in sys.argv[1:]:\n"
        "    gin.clear_config()\n"
        "    try:\n"
        "        path = gin_files.folder() / name\n"
        "        settings = gin_files.settings([path])\n"
        "        required = [key for key, setting in settings.items() if repr(setting.value) == '%gin.REQUIRED']\n"
        "        if ('', 'run', 'job') in settings:\n"
        "            given = [(checks.written(key), 'some/path') for key in required]\n"
        "            binding.bind(main.CONFIGURABLES, [path], given)\n"
        "    except Exception as error:\n"
        "        refused[name] = repr(error)\n"
        "print(json.dumps(refused))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *GIN_FILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", GIN_FILES)
def test_gin_file_of_the_package(name: str, refused: dict[str, str]) -> None:
    """Every file that comes with the package is short, has a header, and describes something the code accepts."""
    text = (GIN / name).read_text("utf-8")
    assert text.startswith("# ") and len(text.splitlines()) <= 40
    assert refused.get(name) is None


def start(*argv: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the real entry point in a process of its own; returns its end and its seconds."""
    begin = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "promot_jax.main", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True), time.monotonic() - begin


def test_process_unknown_file(tmp_path: Path) -> None:
    done, seconds = start("--gin_file=promot_stage_one.gin", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "'promot_stage_one.gin'" in done.stderr and seconds < 10


def test_process_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "mine.gin").write_text("# A typo.\nOptimiser.learning_rate = 3\n")
    done, seconds = start("--gin_file=mine.gin", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (
        done.stderr.startswith("mine.gin line 2: nothing is called 'Optimiser' (did you mean 'Optimizer'?)")
        and seconds < 10
    )
    assert not (tmp_path / "runs").exists()


def test_process_without_arguments(tmp_path: Path) -> None:
    done, _ = start(cwd=tmp_path)
    assert done.returncode == 2 and "Gin files:" in done.stderr


def test_names_exist_and_are_light() -> None:
    """Everything in the table exists, and nothing of it imports TensorFlow."""
    code = (
        "import importlib, sys\n"
        "from promot_jax.main import CONFIGURABLES\n"
        "for module, name in (target.split(':') for target in CONFIGURABLES.values()):\n"
        "    assert callable(getattr(importlib.import_module(module), name)), name\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("output", ["closed", "full"])
def test_process_whose_output_goes_nowhere(tmp_path: Path, output: str) -> None:
    """As `| head -1` leaves it, or a full disk: no traceback, not even that of Python's own flush at exit."""
    reader, closed = os.pipe()
    os.close(reader)
    with open(closed if output == "closed" else "/dev/full", "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "promot_jax.main", "--help"],
            stdout=out, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, text=True,
        )  # fmt: skip
        assert done.returncode in (0, 1) and done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr
        assert done.returncode == 0 or "command resumes the run" in done.stderr
    if output == "full":
        os.close(closed)


def test_the_script_finds_modules_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m promot_jax.main` does: a user's task module lies there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.argv", ["promot_jax", "--help"])
    assert main.main() == 0 and str(tmp_path) in sys.path


def test_a_process_ends_after_a_failed_save_though_a_thread_of_a_library_waits() -> None:
    """As Orbax's do, ten minutes for a folder that they could not make."""
    code = (
        "import threading; from promot_jax import main; main.main, main.GRACE = lambda: 3, 0.1; "
        "main._cannot_save = True; threading.Thread(target=threading.Event().wait, args=(600,)).start(); main.command()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 3


@pytest.mark.parametrize(("error", "shown"), [
    (KeyboardInterrupt(), False), (RuntimeError("Event loop is closed"), False), (RuntimeError("of a user"), True),
])  # fmt: skip
def test_what_is_said_elsewhere_is_not_printed_of_a_callback(
    error: BaseException, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python prints a traceback of what a callback of its garbage collector raises (`sys.unraisablehook`)."""
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_value))

    class Raises:
        def __del__(self) -> None:
            raise error

    with main._quiet_callbacks():
        Raises()
    assert printed == [error] * shown
    Raises()
    assert printed[shown:] == [error]
