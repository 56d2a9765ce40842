"""The live line: one line at the bottom of a terminal that says what runs now; printed lines go above it.

Parts of a program each write a part of the line: a stage its step and loss, an evaluation within it how far it is. The
line is there while one of them is open, and is erased when the last one ends, however it ends. Of several hosts, the
one that writes has it.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promot_jax.distributed import hosts

if TYPE_CHECKING:
    from rich.live import Live

PERIOD = 0.1  # least seconds between two states of the line


class Part:
    """A part of the live line; where there is no terminal, calls change nothing."""

    def __init__(self) -> None:
        self.text = self.short = ""

    def __call__(self, text: str, short: str | None = None) -> None:
        """Writes the part anew; `short` stands for it where the line would be too long with parts to its right."""
        self.text, self.short = text, text if short is None else short
        if self in _parts:
            _draw()


_parts: list[Part] = []
_live: "Live | None" = None
_handlers: list[tuple[Any, Any]] = []  # of logging, and the streams that they wrote to
_drawn = 0.0  # when


def on_terminal() -> bool:
    """Whether this host writes to a terminal that can move the cursor."""
    return hosts.is_writer() and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextlib.contextmanager
def part() -> Iterator[Part]:
    """Opens a part of the live line, to the right of those that are open."""
    opened = Part()
    if not on_terminal():
        yield opened
        return
    _parts.append(opened)
    try:
        if _live is None:
            _start()
        yield opened
    finally:
        _parts.remove(opened)
        if not _parts:
            _stop()
        elif opened.text:
            _draw(at_once=True)


def _start() -> None:
    """Starts the line; what is printed or logged from now on goes through it."""
    global _live
    from rich.console import Console
    from rich.live import Live

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leaves the cursor visible: a process that is killed could not bring it back."""
            return False

    # Printed lines keep their length, so that a path or command in them can be copied.
    console = Terminal(file=sys.stdout, force_terminal=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    _live = Live(console=console, auto_refresh=False, transient=True)
    streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
    _live.start()
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {each for logger in loggers for each in getattr(logger, "handlers", ())}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            _handlers.append((handler, handler.stream))
            handler.setStream(getattr(sys, streams[handler.stream]))


def _stop() -> None:
    global _live
    stopped, _live = _live, None
    while _handlers:
        handler, stream = _handlers.pop()
        handler.setStream(stream)
    if stopped is not None:
        stopped.stop()


def _draw(at_once: bool = False) -> None:
    global _drawn
    now = time.monotonic()
    if _live is None or (now - _drawn < PERIOD and not at_once):
        return
    from rich.text import Text

    _drawn = now
    line = " | ".join(part.text for part in _parts if part.text)
    if len(line) >= _live.console.width:
        line = " | ".join(text for text in [*(part.short for part in _parts[:-1]), _parts[-1].text] if text)
    _live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
