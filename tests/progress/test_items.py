"""How far an evaluation is, by a clock that the test moves."""

import pytest
from terminal import on_terminal

from promot_jax.progress import live_line
from promot_jax.progress.items import shown


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


def test_no_time_left_is_guessed_from_the_first_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    """They come after a whole batch has been processed."""
    clock = Clock()
    for item in shown(range(200), 200, "tiny_icl", clock):
        clock.now += 12 if item == 0 else 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "tiny_icl: 1 of 200"
    assert last == "tiny_icl: 199 of 200, 0.9 per second, 1 s left" or last.endswith("s left")


def test_on_a_terminal_it_is_part_of_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_line, "PERIOD", 0.0)
    clock = Clock()
    with on_terminal(monkeypatch) as terminal:
        for _ in shown(range(400), 400, "tiny_icl", clock):
            clock.now += 1
    *_, last = screens = list(terminal.screens())
    assert "tiny_icl: 100 of 400, 1.0 per second, 5 min 0 s left" in {screen.text for screen in screens}
    assert last.text == ""
