"""How far work on many items is: how many of how many, how fast, the time left."""

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from promot_jax.distributed import hosts
from promot_jax.progress import live_line
from promot_jax.progress.clock import clock, duration

T = TypeVar("T")

PERIOD = 10.0  # seconds between two lines where there is no terminal
LEAST = 0.05  # share of the items after which the time left is estimated: batches of them are finished together


def shown(items: Iterable[T], total: int, what: str, clock: Callable[[], float] = clock) -> Generator[T, None, None]:
    """Yields items, and shows how many of them there were: on the host that writes.

    A terminal shows it in the live line; elsewhere there is a line every ten seconds. A caller whose own work may fail
    closes the generator (`contextlib.closing`), which ends its part of the live line.

    Args:
        items: of which there are `total`.
        total: number of items.
        what: starts the line: "tiny_icl, 4-shot".
        clock: in seconds, without compilation.
    """
    started = last = clock()
    with live_line.part() as line:
        terminal = live_line.on_terminal()
        line(f"{what}: 0 of {total}")
        for count, item in enumerate(items, 1):
            yield item
            now = clock()
            text = f"{what}: {count} of {total}"
            if count >= LEAST * total and now > started:
                rate = count / (now - started)
                text += f", {rate:.1f} per second, {duration((total - count) / rate)} left"
            if terminal:
                line(text)
            elif hosts.is_writer() and count < total and now - last >= PERIOD:
                last = now
                print(text, flush=True)
