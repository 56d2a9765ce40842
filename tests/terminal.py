"""A terminal for tests: what a process writes to it, and what its screen shows then."""

import contextlib
import os
import pty
import re
import select
import sys
import termios
import threading
from collections.abc import Iterator

import pytest

WIDTH = 120
_PIECES = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """The lines of a terminal, as far as its cursor moves by carriage returns, line feeds and the codes for lines."""

    def __init__(self, written: str = "") -> None:
        self.lines = [""]
        self.row = self.column = 0
        for match in _PIECES.finditer(written):
            self._apply(*match.groups())

    def _apply(self, number: str | None, code: str | None, move: str | None, text: str | None) -> None:
        line = self.lines[self.row]
        if text:
            self.lines[self.row] = line[: self.column].ljust(self.column) + text + line[self.column + len(text) :]
            self.column += len(text)
        elif move == "\r":
            self.column = 0
        elif move == "\n":
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
        elif code == "K" and number == "2":
            self.lines[self.row] = ""
        elif code == "A":
            self.row -= int(number or 1)
        else:
            assert code in (None, "m"), code

    @property
    def text(self) -> str:
        """All lines, without spaces at their ends and empty lines after the last."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")


class Terminal:
    """What was written to the terminal, once it is closed."""

    written = ""

    def screens(self) -> Iterator[Screen]:
        """The screens that a user saw: after each piece that ends a state of the live line, and the last one."""
        for match in re.finditer(r"(?<=[^\r\n])(?=\r|\n|$)", self.written):
            yield Screen(self.written[: match.end()])
        yield Screen(self.written)


@contextlib.contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Makes stdout and stderr a terminal that is 120 characters wide."""
    reader, writer = pty.openpty()
    mode = termios.tcgetattr(writer)
    mode[1] &= ~termios.ONLCR
    termios.tcsetattr(writer, termios.TCSANOW, mode)
    termios.tcsetwinsize(writer, (40, WIDTH))
    terminal, pieces, closed = Terminal(), list[bytes](), threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):  # once the other side is closed, which a process of the test may outlive
            while (ready := select.select([reader], [], [], 0.2)[0]) or not closed.is_set():
                if ready:
                    pieces.append(os.read(reader, 1 << 16))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    before = os.dup(2)
    try:
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as file:
            os.dup2(writer, 2)
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            patch.setenv("TERM", "xterm")
            patch.delenv("COLUMNS", raising=False)
            try:
                yield terminal
            finally:
                os.dup2(before, 2)
                os.close(before)
    finally:
        closed.set()
        thread.join()
        os.close(reader)
    # Without ONLCR, so that a line feed that a program wrote is told from one that starts a line.
    terminal.written = b"".join(pieces).decode().replace("\n", "\r\n")
