"""Errors that end a run: one sentence that names what is wrong, where, and what to do."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input. `main` prints the message and exits with status 2."""


class TrainingError(Exception):
    """A run that cannot continue, for instance after a NaN loss. `main` prints the message and exits with status 1."""


class HostError(TrainingError):
    """A run that cannot continue because another of its hosts is missing; the run itself may be sound."""


class PreemptedError(Exception):
    """A run that stops because its machine is about to be preempted. `main` exits with status 75."""


RUN_ERRORS = (UserError, TrainingError, PreemptedError)  # what code around a user's function lets pass


def described(error: Exception) -> str:
    """Returns an error of a user's code in one line: its kind, its message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)`, else ` (known: ...)` with the sorted options, "" if there are none."""
    known = sorted(set(options))
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f" (did you mean {close[0]!r}?)"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (known: {shown})" if known else ""
