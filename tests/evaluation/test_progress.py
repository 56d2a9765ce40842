"""Lines on the screen while an evaluation runs, by a clock that the test moves."""

import sys

import pytest

from promot_jax.evaluation.progress import shown


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for item in shown(iter(range(100)), 100, "tiny_icl", clock):
        assert item == clock.now / 0.5
        clock.now += 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny_icl: 20 of 100, 2.0 per second, 40 s left" and len(lines) == 4
    for _ in shown(range(3), 3, "short", clock):
        pass
    assert capsys.readouterr().out == ""


def test_one_line_on_a_terminal_that_goes_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    clock = Clock()
    for _ in shown(range(400), 400, "tiny_icl", clock):
        clock.now += 1
    out = capsys.readouterr().out
    assert "\n" not in out and "\rtiny_icl: 100 of 400, 1.0 per second, 5 min 0 s left" in out
    assert out.endswith("\r") and not out.rpartition("left")[2].strip()
