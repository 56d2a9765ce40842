"""What a stage's training saves, and where it resumes: its state, its curve, its two folders of checkpoints."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NoReturn

from promot_jax import trees
from promot_jax.checkpoints.orbax import Checkpoints, existing
from promot_jax.distributed import preemption
from promot_jax.errors import PreemptedError
from promot_jax.results import records
from promot_jax.training.state import TrainState


@dataclasses.dataclass
class Progress:
    """What a stage has recorded so far; a checkpoint holds it as JSON."""

    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the evaluations, step 0 first
    losses: list[float] = dataclasses.field(default_factory=list)  # of the updates since the last evaluation
    seconds: float = 0.0  # of training and evaluation, in earlier attempts

    def __post_init__(self) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def spent(self) -> float:
        """Seconds over all attempts."""
        return self.seconds + time.monotonic() - self._started


class StageCheckpoints:
    """The checkpoints of a stage, in two folders.

    `checkpoints/` is written after evaluations and keeps the newest and the best, which is handed over. `preempted/` is
    written when the machine is about to be taken away, evaluated or not; only resuming reads it.

    Attributes:
        step: of the last save; 0 for none.
    """

    def __init__(self, folder: Path, name: str, *, keep_period: int, run: str):
        self._name, self._folder, self._run = name, folder / "preempted", run
        self._evaluated = Checkpoints(folder / "checkpoints", keep_period=keep_period, run=run)
        self._preempted = existing(self._folder, run)
        self.step = 0

    def resume(self, state: TrainState) -> tuple[TrainState, Progress]:
        """Reads the newest save onto the shapes and shardings of a fresh state; that state where nothing is saved.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another model, optimizer or run.
        """
        evaluated = self._evaluated.latest() or 0
        preempted = self._preempted.latest() or 0 if self._preempted else 0
        # Of one step in both, that in `checkpoints` is evaluated, too.
        newest = self._preempted if self._preempted and preempted > evaluated else self._evaluated
        self.step = max(evaluated, preempted)
        if not self.step:
            return state, Progress()
        saved, progress = newest.restore(self.step, vars(state))
        print(f"[{self._name}] resumes from step {self.step} in {newest.folder}.", flush=True)
        where, advice = f"{newest.folder}/{self.step}", "put a copy of it back, or delete the run's folder"
        return TrainState(**saved), records.parse(progress, Progress, f"The progress in {where}", advice)

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Saves an evaluated state in the background; its score is that of the curve's last evaluation."""
        _save(self._evaluated, step, state, progress, float(progress.curve[-1]["target"]))
        self.step = step

    def preempt(self, step: int, state: TrainState, progress: Progress) -> NoReturn:
        """Saves a state, unless it is saved already, and raises PreemptedError."""
        self._evaluated.close()
        if step > self.step:
            checkpoints = self._preempted or Checkpoints(self._folder, run=self._run)
            _save(checkpoints, step, state, progress, -1.0)
            checkpoints.close()
        raise PreemptedError(f"[{self._name}] {preemption.word()}; the state of step {step} is saved.")

    def newest(self) -> Path | None:
        """The newest evaluated checkpoint, once it is on disk; None for none."""
        self._evaluated.wait()
        step = self._evaluated.latest()
        return self._evaluated.folder / str(step) if step else None

    def finish(self, best: int, like: trees.Tree) -> trees.Tree:
        """Reads the trained parameters of the best checkpoint, and deletes what only resuming needs."""
        self._evaluated.wait()
        params = self._evaluated.parameters(best, like)
        self._evaluated.close()
        if self._preempted is not None:
            self._preempted.remove()
        return params


def _save(checkpoints: Checkpoints, step: int, state: TrainState, progress: Progress, score: float) -> None:
    recorded = {"curve": progress.curve, "losses": progress.losses, "seconds": progress.spent()}
    checkpoints.save(step, vars(state), recorded, score)
