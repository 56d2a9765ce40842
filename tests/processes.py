"""Processes that a test starts: what is left of them ends with the test (`conftest`), whatever becomes of that."""

import subprocess
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
