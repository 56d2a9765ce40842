"""What a stage shows of itself, by a clock that the test moves."""

import numpy as np
import pytest

from promot_jax.progress.live_line import Part
from promot_jax.training import log as log_module
from promot_jax.training.log import Log, tokens_of
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training


class Run:
    """A stage of 40 updates of 2 s and evaluations of 30 s every 10 updates, that of step 0 of 1 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int = 40) -> None:
        self.now, self.written = 0.0, list[tuple[int, dict[str, float]]]()
        self.shown: dict[int, str] = {}
        monkeypatch.setattr(log_module, "clock", lambda: self.now)
        line = Part()
        training = Training(steps, 4, 10, Optimizer("adamw", 0.01))
        log = Log("stage2", training, lambda *entry: self.written.append(entry), line)
        log.starts(0, None)
        assert line.text == line.short == f"[stage2] 0/{steps}"
        self.now += 1
        entry = {"target": 50.0, "icl": 60.0, "loss": None, "validation_loss": 0.25, "kl_icl": 0.125}
        log.evaluation(0, entry)
        log.starts(0, entry)
        self.now += 7  # batches that a resumed run reads again
        log.restart()
        for step in range(1, steps + 1):
            self.now += 2
            log.update(step, {"loss": 0.5, "grad_norm": 1.5}, tokens=100)
            self.shown[step] = line.text
            assert line.short == f"[stage2] {step}/{steps}"
            if step % 10 == 0 or step == steps:
                self.now += 30
                log.evaluation(step, {"target": 70.0 + step, "loss": 0.4})
                log.evaluated(step, {"target": 70.0 + step, "loss": 0.4})


def test_the_line_has_step_loss_speed_latest_scores_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch)
    before = "tokens/s  target 50.0  ICL 60.0"
    # How long an evaluation takes is not known yet: that of step 0 may be read from memory.
    assert run.shown[1] == f"[stage2] 1/40  loss 0.5000  50 {before}  1 min 18 s and 4 evaluations left"
    assert run.shown[10] == f"[stage2] 10/40  loss 0.5000  50 {before}  1 min 0 s and 4 evaluations left"
    assert run.shown[11] == "[stage2] 11/40  loss 0.5000  50 tokens/s  target 80.0  2 min 28 s left"  # 58 s + 3 x 30 s
    assert run.shown[40].endswith("target 100.0  30 s left")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[stage2] step 0: target 50.0  icl 60.0  validation_loss 0.2500  kl_icl 0.1250"
    assert lines[1].startswith("[stage2] 10/40  loss 0.5000  gradient 1.5  2.00 s/step  50 tokens/s  1 min 0 s and 4 ")
    assert lines[3].endswith("20/40  loss 0.5000  gradient 1.5  2.00 s/step  50 tokens/s  2 min 10 s left")
    assert len(lines) == 9
    assert run.written[1] == (1, {"train/loss": 0.5, "train/grad_norm": 1.5, "train/rate": 0.01})


def test_the_last_evaluation_may_be_off_the_period(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, steps=15)
    assert run.shown[9].endswith("12 s and 2 evaluations left") and run.shown[11].endswith("38 s left")
    assert run.shown[15].endswith("  30 s left")


def test_on_a_terminal_updates_print_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_module, "on_terminal", lambda: True)
    Run(monkeypatch)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"[stage2] step {step}" for step in (0, 10, 20, 30, 40)
    ]


def test_padding_is_no_token() -> None:
    assert tokens_of({"segment_ids": np.array([[1, 1, 2, 0], [1, 0, 0, 0]])}) == 4
    assert tokens_of({"segment_ids": np.array([[1, 1, 0]]), "decoder_segment_ids": np.array([[1, 0]])}) == 3
