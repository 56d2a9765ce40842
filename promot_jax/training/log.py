"""What a stage shows and writes of its updates and evaluations."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from promot_jax.progress.clock import clock, duration
from promot_jax.progress.live_line import Part, on_terminal
from promot_jax.training.settings import Training

Write = Callable[[int, dict[str, float]], None]

_UPDATES = 20  # least number of updates that the speed is a mean of


class Log:
    """Hands numbers to the writers, and shows them: in the live line, or in a line now and then."""

    def __init__(self, name: str, training: Training, write: Write, line: Part):
        """Starts the log of a stage.

        Args:
            name: of the stage.
            training: its settings.
            write: takes `(step, scalars)` of every update and evaluation.
            line: its part of the live line.
        """
        self._name, self._training, self._write, self._line = name, training, write, line
        self._rate = training.optimizer.rate(training.steps)
        # Seconds and tokens of the latest updates, without compilation.
        self._updates: collections.deque[tuple[float, int]] = collections.deque(
            maxlen=max(training.log_period, _UPDATES)
        )
        self._evaluations: list[float] = []  # their seconds, with saving; that of step 0 is left out
        self._scores = ""  # of the latest evaluation
        self._last = clock()

    def starts(self, step: int, scores: Mapping[str, Any] | None) -> None:
        """Shows a step and the latest scores, and begins to time the next update."""
        self._scores = _shown_scores(scores or {})
        self._show(step, self._scores)
        self.restart()

    def restart(self) -> None:
        """Begins to time the next update anew."""
        self._last = clock()

    def update(self, step: int, scalars: Mapping[str, float], tokens: int) -> None:
        """After an update; `tokens` are those that it has processed."""
        now = clock()
        self._updates.append((now - self._last, tokens))
        self._last = now
        rate = float(self._rate(step - 1))
        self._write(step, {f"train/{name}": value for name, value in scalars.items()} | {"train/rate": rate})
        seconds, total = map(math.fsum, zip(*self._updates, strict=True))
        speed = f"{total / seconds:,.0f} tokens/s" if seconds > 0 else ""
        left = self._left(step, seconds / len(self._updates))
        self._show(step, f"loss {scalars['loss']:.4f}", speed, self._scores, left)
        if not on_terminal() and (step % self._training.log_period == 0 or step == self._training.steps):
            pace = f"{seconds / len(self._updates):.2f} s/step"
            gradient = f"gradient {scalars['grad_norm']:.3g}"
            print("  ".join([self._at(step), f"loss {scalars['loss']:.4f}", gradient, pace, speed, left]), flush=True)

    def evaluation(self, step: int, entry: Mapping[str, Any]) -> None:
        """Writes and prints the scores of an evaluation."""
        names = {name: f"eval/{name}" for name in entry} | {"loss": "train/mean_loss"}  # since the evaluation before
        scalars = {names[name]: value for name, value in entry.items() if isinstance(value, float)}
        self._write(step, scalars)
        shown = "  ".join(
            f"{tag.removeprefix('eval/')} {value:.{1 if '/kl_' not in tag and 'loss' not in tag else 4}f}"
            for tag, value in scalars.items()
        )
        print(f"[{self._name}] step {step}: {shown}", flush=True)

    def evaluated(self, step: int, entry: Mapping[str, Any]) -> None:
        """After the evaluation that followed the latest update, and its checkpoint."""
        self._evaluations.append(clock() - self._last)
        self.starts(step, entry)

    def _at(self, step: int) -> str:
        return f"[{self._name}] {step}/{self._training.steps}"

    def _show(self, step: int, *texts: str) -> None:
        self._line("  ".join(filter(None, [self._at(step), *texts])), self._at(step))

    def _left(self, step: int, pace: float) -> str:
        """The time left after an update: that of further updates and of the evaluations to come, as far as known."""
        steps, period = self._training.steps, self._training.eval_period
        to_come = steps // period - (step - 1) // period + (steps % period > 0)  # one may follow this very update
        updates = pace * (steps - step)
        if self._evaluations:
            mean = math.fsum(self._evaluations) / len(self._evaluations)
            return f"{duration(updates + mean * to_come)} left"
        return f"{duration(updates)} and {to_come} evaluation{'s' * (to_come != 1)} left"


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Number of tokens in a batch that are no padding, soft prompts included; of the rows that this host has read."""
    return sum(int(np.count_nonzero(batch[name])) for name in ("segment_ids", "decoder_segment_ids") if name in batch)


def _shown_scores(entry: Mapping[str, Any]) -> str:
    labels = {"target": "target", "icl": "ICL"}
    return "  ".join(f"{label} {entry[name]:.1f}" for name, label in labels.items() if entry.get(name) is not None)
