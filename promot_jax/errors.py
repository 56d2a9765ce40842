"""Errors a user can mend: one clear sentence, what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. `main` prints the message as it is and exits with status 2."""


class TrainingError(Exception):
    """A run that cannot go on (a NaN loss, say). `main` prints the message and exits with status 1."""


class HostError(TrainingError):
    """A run that cannot go on because another of its hosts does not come; that says nothing of what was run."""


class PreemptedError(Exception):
    """A run that stops because its machine is about to be taken away. `main` exits with status 75."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)`, or the sorted options when none is close, or nothing when there are none."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (known: {shown})"
