"""Errors that end a run: one sentence that names what is wrong, where, and what to do."""

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input. `main` prints the message and exits with status 2."""


class TrainingError(Exception):
    """A run that cannot continue, for instance after a NaN loss. `main` prints the message and exits with status 1."""


class StorageError(TrainingError):
    """A run that cannot continue because it cannot write: the disk is full, say, or its folder is gone."""


class HostError(TrainingError):
    """A run that cannot continue because another of its hosts is missing; the run itself may be sound."""


class TakenOverError(TrainingError):
    """A run that has to let go of its folder: another process took it over, or it was deleted. Exit status 75."""


class PreemptedError(Exception):
    """A run that stops because it was told to, saved: `main` exits with status 75, after Ctrl-C with 130."""


RUN_ERRORS = (UserError, TrainingError, PreemptedError)  # what code around a user's function lets pass


@contextlib.contextmanager
def users_code(what: str, advice: str = "") -> Iterator[None]:
    """Turns an error of a user's code inside, of any kind, into a UserError: `what` fails, why, and `advice`."""
    try:
        yield
    except RUN_ERRORS:
        raise
    except Exception as error:
        raise UserError(f"{what} fails ({described(error)}){advice}.") from error


def described(error: Exception) -> str:
    """Returns an error of a user's code in one line: its kind, its message, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())}, {Path(frame.filename).name} line {frame.lineno}"


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)`, else ` (known: ...)` with the sorted options, "" if there are none."""
    known = sorted(set(options))
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f" (did you mean {close[0]!r}?)"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (known: {shown})" if known else ""


def half_character(text: str) -> str:
    """Returns where a text has half a character, a surrogate alone, which UTF-8 cannot write; "" for a sound text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start].encode("unicode_escape").decode()
        return f"has half a character, {surrogate} at {error.start}: a surrogate alone"
    return ""
