"""The live line on a terminal: what a user sees while it is there, and that nothing of it stays."""

import logging
import sys

import pytest
from terminal import WIDTH, on_terminal

from promot_jax.distributed import hosts
from promot_jax.progress import live_line


@pytest.fixture(autouse=True)
def _every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_line, "PERIOD", 0.0)


def test_printed_lines_go_above_the_line_which_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a path " * 40
    with on_terminal(monkeypatch) as terminal:
        print("before")
        with live_line.part() as stage:
            stage("[stage1] 1/60  loss 0.5", "[stage1] 1/60")
            print("first", "line")
            print("an error", file=sys.stderr)
            with live_line.part() as evaluation:
                evaluation("tiny_icl: 3 of 12")
                print(long)
            print("[red]last[/red] :smile: 12")
        print("after")
    seen = [screen.text for screen in terminal.screens()]
    assert any(text.endswith("before\n[stage1] 1/60  loss 0.5") for text in seen)
    assert any(text.endswith("an error\n[stage1] 1/60  loss 0.5 | tiny_icl: 3 of 12") for text in seen)
    assert any(text.endswith("an error\n[stage1] 1/60  loss 0.5") for text in seen[3:])
    lines = ["before", "first line", "an error", long.rstrip(), "[red]last[/red] :smile: 12", "after"]
    assert seen[-1].split("\n") == lines
    assert "\x1b[?25l" not in terminal.written  # the cursor is not hidden


def test_a_long_line_is_shortened_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(monkeypatch) as terminal, live_line.part() as stage, live_line.part() as evaluation:
        stage("[stage1] 1/60  " + "x" * 100, "[stage1] 1/60")
        evaluation("tiny_icl: 3 of 12, 5 min left")
        evaluation("y" * 300)
    seen = [screen.lines[0].rstrip() for screen in terminal.screens()]
    assert "[stage1] 1/60 | tiny_icl: 3 of 12, 5 min left" in seen
    assert max(map(len, seen)) <= WIDTH and any(line.endswith("yyy…") for line in seen)
    assert terminal.written.count("y") < 130  # nothing was wrapped by the terminal


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_ends_with_what_ends_the_program(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with live_line.part() as stage, live_line.part() as evaluation:
            stage("[stage1] 1/60")
            evaluation("tiny_icl: 3 of 12")
            raise error

    with on_terminal(monkeypatch) as terminal:
        with pytest.raises(error):
            fail()
        print("It failed.", file=sys.stderr)
    *_, last = terminal.screens()
    assert last.text == "It failed." and last.column == 0


def test_a_log_handler_of_before_writes_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_terminal(monkeypatch) as terminal:
        handler = logging.StreamHandler()
        logger = logging.getLogger("test_live_line")
        logger.addHandler(handler)
        with live_line.part() as stage:
            stage("[stage1] 1/60")
            logger.warning("It is slow.")
            stage("[stage1] 2/60")
        assert handler.stream is sys.stderr
        logger.removeHandler(handler)
    *_, last = terminal.screens()
    assert last.text == "It is slow."


@pytest.mark.parametrize("reason", ["no terminal", "dumb terminal", "other host"])
def test_elsewhere_there_is_none(
    reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show() -> None:
        with live_line.part() as stage:
            stage("[stage1] 1/60")
            print("a line")

    if reason == "no terminal":
        show()
        assert capsys.readouterr().out == "a line\n"
        return
    with on_terminal(monkeypatch) as terminal:
        if reason == "dumb terminal":
            monkeypatch.setenv("TERM", "dumb")
        else:
            monkeypatch.setattr(hosts, "is_writer", lambda: False)
        show()
    assert terminal.written == "a line\r\n"
