"""A run on a terminal, which Ctrl-C ends in the middle: what the user saw, and what stays on the screen."""

import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
from terminal import on_terminal

from promot_jax import main
from promot_jax.progress import live_line
from promot_jax.training.log import Log


def test_training_and_evaluating_have_one_line_which_ctrl_c_erases(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Log.update

    def interrupted(log: Log, step: int, scalars: Mapping[str, float], tokens: int) -> None:
        update(log, step, scalars, tokens)
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Log, "update", interrupted)
    monkeypatch.setattr(live_line, "PERIOD", 0.0)
    with on_terminal(monkeypatch) as terminal:
        status = main.main(tiny.command(tiny_folder, "finetune.gin", tmp_path / "run", TRAIN_STEPS=8))
    assert status == 130
    screens = [screen.text for screen in terminal.screens()]
    last_lines = "\n".join(text.rpartition("\n")[2] for text in screens)
    scores = r"target \d+\.\d  ICL \d+\.\d"
    first = rf"^\[finetune\] 1/8  loss \d\.\d+  [\d,]+ tokens/s  {scores}  \d+ s and 4 evaluations left$"
    assert re.search(first, last_lines, re.M)
    assert re.search(rf"^\[finetune\] 3/8  loss .*  {scores}  .* left$", last_lines, re.M)
    assert re.search(r"^\[finetune\] 0/8 \| tiny_review: [1-6] of 6, .* left$", last_lines, re.M)
    assert re.search(r"^\[finetune\] 4/8 .*\| tiny_colour_\dshot and 1 more: [1-8] of 8, .* left$", last_lines, re.M)

    *before, interrupt, stopped = screens[-1].splitlines()
    assert interrupt == "Interrupted: stops at the next step, saved. Ctrl-C again stops at once, unsaved."
    assert stopped == "[finetune] interrupted; the state of step 5 is saved. The same command resumes the run."
    assert [line for line in before if re.match(r"\[finetune\] (\d|.* left)", line)] == []  # of the live line
    assert [line.partition(":")[0] for line in before if "[finetune] step" in line] == [
        f"[finetune] step {step}" for step in (0, 2, 4)
    ]
