"""A run as trackers see it: its settings, its stages with their numbers and outputs, its final scores."""

import contextlib
import importlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.errors import users_code
from promot_jax.results import records
from promot_jax.results.schema import Run
from promot_jax.results.scores import Sample
from promot_jax.trackers.settings import SERVICES, Tracker
from promot_jax.trackers.tensorboard import TensorBoard
from promot_jax.trackers.writer import Writer, Writers

FILE = "tracker.json"  # in the folder of a run: which one it is for its tracker
_COLUMNS = ("task", "input", "target", "output")


class _Service:
    """A run of Weights & Biases or Trackio, whose interfaces are alike."""

    def __init__(self, tracker: Tracker, folder: Path, config: Mapping[str, Any]):
        """Begins the run, or goes on with the one that the folder names."""
        self._module = importlib.import_module(tracker.name)
        identity = _identity(folder, tracker)
        options: dict[str, Any] = {"project": identity["project"], "name": identity["name"], "resume": "allow"}
        if tracker.name == "wandb":
            # It would copy what is printed from below the live line.
            options |= {"id": identity["id"], "dir": folder, "settings": self._module.Settings(console="off")}
        else:
            options |= {"embed": False}
        advice = "; log in with `wandb login`, or set WANDB_MODE=offline" if tracker.name == "wandb" else ""
        with users_code(f"{SERVICES[tracker.name]} (TRACKER = {tracker.name!r})", advice):
            self._run = self._module.init(config=dict(config), **options)

    def stage(self, name: str) -> Writer:
        """What takes the numbers of a stage, under its name and against its own steps."""
        if hasattr(self._run, "define_metric"):
            self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        return _StageOfService(self, name)

    def log(self, values: Mapping[str, float], samples: Sequence[Sample] = (), prefix: str = "") -> None:
        """Sends numbers, and outputs as a table."""
        entries: dict[str, Any] = {f"{prefix}/{name}": value for name, value in values.items()}
        if samples:
            rows = [[getattr(sample, column) for column in _COLUMNS] for sample in samples]
            entries[f"{prefix}/generations"] = self._module.Table(columns=list(_COLUMNS), data=rows)
        self._run.log(entries)

    def finish(self, finished: bool) -> None:
        """Ends the run; one that is not finished goes on when it is resumed."""
        if self._module.__name__ == "wandb":
            self._run.finish(exit_code=int(not finished))
        else:
            self._run.finish()


class _StageOfService:
    """The part of a run that is one stage; a `Writer`."""

    def __init__(self, service: _Service, name: str):
        self._service, self._name = service, name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._service.log({**values, "step": step}, prefix=self._name)

    def outputs(self, step: int, samples: Sequence[Sample]) -> None:
        self._service.log({"step": step}, samples, self._name)

    def close(self) -> None:
        """The run ends later."""


class TrackedRun:
    """A run of a method, as its trackers have it."""

    def __init__(self, folder: Path, service: _Service | None = None):
        self._folder, self._service = folder, service

    @contextlib.contextmanager
    def stage(self, folder: Path, name: str) -> Iterator[Writer]:
        """Opens the writers of a stage in its folder: TensorBoard's, and that of the tracker.

        Closed, which writes it all, also where training fails: then the last numbers matter most.
        """
        writers: list[Writer] = []
        if hosts.is_writer():
            writers.append(TensorBoard(folder / "events"))
        if self._service:
            below = folder != self._folder and folder.is_relative_to(self._folder)
            writers.append(self._service.stage(folder.relative_to(self._folder).as_posix() if below else name))
        with contextlib.closing(Writers(writers)) as all_of_them:
            yield all_of_them

    def final(self, run: Run) -> None:
        """Takes the scores of the final evaluation."""
        if not self._service:
            return
        scores = {"target": run.target.score if run.target else None}
        for shots, icl in run.icl.items():
            scores |= {f"icl_{shots}shot": icl.norm_avg, f"format_share_{shots}shot": icl.format_share}
        known = {name: score for name, score in scores.items() if score is not None}
        self._service.log(known, run.samples, "final")


@contextlib.contextmanager
def tracked(tracker: Tracker, folder: Path, config: Mapping[str, Any]) -> Iterator[TrackedRun]:
    """Opens a run at its tracker, on the host that writes; a run that is resumed in its folder is the same there, too.

    What was done after the checkpoint that it goes on from is reported twice, with the same values.

    Args:
        tracker: which, if any.
        folder: of the run; `tracker.json` there names it.
        config: its settings, JSON.

    Raises:
        UserError: the tracker does not start.
    """
    services: list[_Service] = []
    if tracker.name:
        hosts.decide(lambda: services.append(_Service(tracker, folder, config)), "the tracker")
    finished = False
    try:
        yield TrackedRun(folder, *services)
        finished = True
    finally:
        for service in services:
            service.finish(finished)


def _identity(folder: Path, tracker: Tracker) -> dict[str, str]:
    """Name and id of a folder's run at its tracker: made once, kept in the folder."""
    path = folder / FILE
    if path.is_file():
        identity = records.read(path, dict[str, str])
        if identity.get("tracker") == tracker.name and {"project", "name", "id"} <= identity.keys():
            return identity
    number = uuid.uuid4().hex[:8]
    # Trackio goes on with a run by its name.
    name = os.fspath(folder) + (f"-{number}" if tracker.name == "trackio" else "")
    identity = {"tracker": tracker.name, "project": tracker.project, "name": name, "id": number}
    files.write(identity, path)
    return identity
