"""Time without compilation: rates and times left are measured by a clock that stands still while JAX compiles."""

import functools
import threading
import time

import jax

_PREFIX = "/jax/core/compile/"  # events of tracing, lowering and compiling a program


class _Compiled(threading.local):
    """What this thread has compiled: JAX compiles in the thread that calls the program."""

    seconds = 0.0

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []  # start and end of the latest


_compiled = _Compiled()


def clock() -> float:
    """Seconds from some point in time on, less those in which this thread compiled."""
    _listen()
    return time.monotonic() - _compiled.seconds


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_time_span_listener(_note)


def _note(event: str, start_time: float, end_time: float, **_: str | int) -> None:
    """Adds a time span to the compiled ones; spans inside it, of functions that it calls, are already counted."""
    if not event.startswith(_PREFIX):
        return
    spans = _compiled.spans
    while spans and spans[-1][0] >= start_time:
        start, end = spans.pop()
        _compiled.seconds -= end - start
    _compiled.seconds += end_time - start_time
    spans.append((start_time, end_time))
    del spans[:-100]


def duration(seconds: float) -> str:
    """`40 s`, `5 min 0 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
