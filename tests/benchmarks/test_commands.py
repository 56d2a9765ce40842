"""Timing of commands: to the end, to a line, and between lines."""

import sys
from pathlib import Path

import pytest

from benchmarks import commands


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run() -> None:
    measures = commands.run(python("import time; time.sleep(0.1); x = bytearray(50_000_000)"))
    assert measures["seconds"] > 0.1 and measures["peak_bytes"] > 50e6


def test_until_stops_at_the_line() -> None:
    endless = (
        "import time, os; print('loaded', flush=True); print('step 1', os.environ['PLACE'], flush=True); time.sleep(99)"
    )
    command = python(endless)
    assert commands.until(command, "^step 1 /.*/cache", {"PLACE": "{scratch}/cache"})["seconds"] < 30
    with pytest.raises(RuntimeError, match="before it printed 'step 2' 1 times"):
        commands.until(python("print('step 1')"), "step 2")


def test_updates_leave_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "WARM_UP", 2)
    lines = "import time\nfor step, wait in enumerate([0, 1, .05, .05, .05], 1):\n"
    lines += "    time.sleep(wait)\n    print(f'[finetune] {step}/9  loss', flush=True)\n"
    assert 0.04 < commands.updates(python(lines), "finetune", 3) < 0.5


def test_job_counts_the_characters_of_its_raw_outputs(tmp_path: Path) -> None:
    writes = "import sys, pathlib; at = pathlib.Path(sys.argv[1].removeprefix('--workdir=')); at.mkdir()\n"
    writes += """(at / "o.jsonl").write_text('{"raw": "ab"}\\n{"raw": "c"}\\n')"""
    assert commands.job(python(writes), "o.jsonl")["characters"] == 3
