"""Processes that a test starts: what is left of them ends with the test (`conftest`), whatever becomes of that."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

started: list["subprocess.Popen[str]"] = []


def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
    """`subprocess.Popen` with text."""
    process = subprocess.Popen(command, text=True, **options)
    started.append(process)
    return process


def end_all() -> None:
    """Kills what still runs, and closes the pipes."""
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
    started.clear()


def python(code: str, **environment: str) -> str:
    """Runs a script in a process of its own, on the CPU, and returns what it prints."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
