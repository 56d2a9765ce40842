"""How far an evaluation is, on the screen: how many examples of how many, how fast, time left."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from promot_jax.distributed import hosts

T = TypeVar("T")

PERIOD = 10.0  # seconds between two lines
TERMINAL_PERIOD = 0.5  # between two states of the one line on a terminal


def shown(items: Iterable[T], total: int, what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[T]:
    """Yields items, and says from time to time how many of them there were: on the host that writes.

    A terminal shows one line, which goes at the end; elsewhere lines follow each other. What is done within a period
    shows none.

    Args:
        items: of which there are `total`.
        total: number of items.
        what: starts the line: "tiny_icl, 4-shot".
        clock: in seconds.
    """
    terminal = sys.stdout.isatty()
    started = last = clock()
    line = ""
    for count, item in enumerate(items, 1):
        yield item
        now = clock()
        if hosts.is_writer() and count < total and now - last >= (TERMINAL_PERIOD if terminal else PERIOD):
            last, rate = now, count / (now - started)
            text = f"{what}: {count} of {total}, {rate:.1f} per second, {_time((total - count) / rate)} left"
            print("\r" + text.ljust(len(line)) if terminal else text, end="" if terminal else "\n", flush=True)
            line = text
    if terminal and line:
        print("\r" + " " * len(line) + "\r", end="", flush=True)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
