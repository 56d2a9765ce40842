"""The comparison: runs the cells that are not there yet, on one machine or several, and reports what is there.

What is done stands on disk alone, cell by cell: `results.json` when it is finished, `failed.json` when it cannot be.
Processes on several machines that share the folder deal the cells out by leases (`promot_jax.sweep.leases`).
"""

import contextlib
import errno
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax.checkpoints import stage_folder
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import HostError, PreemptedError, StorageError, TakenOverError, TrainingError, UserError
from promot_jax.experiments.method import run_method
from promot_jax.experiments.session import Session, check_method, open_session, with_experiment
from promot_jax.params import freezing
from promot_jax.results import schema
from promot_jax.results.schema import Comparison
from promot_jax.sweep import status
from promot_jax.sweep.archive import keep, restore
from promot_jax.sweep.collect import latest, publish
from promot_jax.sweep.grid import Cell, Grid
from promot_jax.sweep.leases import hold, owner
from promot_jax.sweep.shared_stages import share_stage

# Errors of the system that the other cells would meet too: a full disk, a quota, a closed output.
OF_ALL_CELLS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO, errno.EPIPE}

NOTICED = 5.0  # seconds after which a wait for other processes asks whether this one is preempted


def run(
    grid: Grid,
    wait: bool,
    stale: float,
    serve: int | None = None,
    archive: Path | None = None,
    run_cells: bool = True,
) -> None:
    """Runs the cells of a comparison that are not there yet, and reports what is there; arguments as of the job.

    Raises:
        UserError: names or values that cannot be, or a cell that was started with other settings.
        TrainingError: cells failed. The others have been run and reported.
        PreemptedError: while a cell runs, or between looks at those of other processes.
    """
    if not 0 < stale <= 1e9:  # the lease's thread waits for a tenth of it, and a wait has a limit
        raise UserError(f"STALE is {stale}; it has to be a number of seconds above 0, at most 1e9.")
    if serve is not None and not 0 <= serve < 2**16:
        raise UserError(f"SERVE is {serve}, which is no port: give one from 1 to 65535, or 0 for any.")
    cells = list(grid.cells())
    if archive:
        restore(grid, archive, cells)
    if run_cells:
        _run_cells(grid, cells, wait, stale, serve, archive)
    publish(grid, stale)
    if hosts.is_writer():
        _report(grid, stale)
    failed = hosts.decide(
        lambda: [f"{cell}: {failed.message}" for cell in cells if (failed := status.failure(grid, cell))], "failures"
    )
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(cells)} cells failed, the report has the others. {' '.join(failed)}"
        )


def _run_cells(
    grid: Grid, cells: Sequence[Cell], wait: bool, stale: float, serve: int | None, archive: Path | None
) -> None:
    """Loads the model and runs the cells that are not there yet."""
    experiments = [grid.experiment_of(one) for one in {cell.trained_task: cell for cell in cells}.values()]
    session = open_session(grid.experiment_of(cells[0]), experiments, check=partial(_check, grid, cells), trains=True)
    _check_frozen(grid, cells, session)
    with _served(grid, serve if hosts.is_writer() else None):
        _Process(grid, session, stale, archive).run(cells, wait)


def _check(grid: Grid, cells: Sequence[Cell]) -> None:
    """Raises one UserError for all that would stop the comparison only when it comes to those cells."""
    wrong: list[str] = []
    for cell in cells:
        try:
            tuning = grid.tuning_of(cell)
            check_method(grid.experiment_of(cell), tuning.method(cell.method), tuning)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(" ".join(dict.fromkeys(wrong)))


def _check_frozen(grid: Grid, cells: Sequence[Cell], session: Session) -> None:
    """Raises UserError for layers or patterns to freeze that the model does not have, before anything is trained."""
    tunings = [(grid.tuning_of(cell), cell.method) for cell in cells]
    tuned = [(tuning, stage) for tuning, method in tunings for stage in tuning.method(method).stages]
    for patterns in {tuning.of(stage).freeze: None for tuning, stage in tuned if stage.trains == ("model",)}:
        if patterns:
            freezing.split({"model": session.base.params}, ("model",), patterns)


@contextlib.contextmanager
def _served(grid: Grid, port: int | None) -> Iterator[None]:
    if port is None:
        yield
        return
    from promot_jax.report.page import serve

    with serve.serving(grid.workdir / grid.report, port, _analysed(grid)) as address:
        print(f"The report, as it grows: {address}", flush=True)
        yield


def _analysed(grid: Grid) -> list[Path]:
    """Where analyses of the cells may lie, all tasks together."""
    return [grid.workdir, *map(grid.cells_folder, grid.tasks)]


class _Process:
    """One process's part in a comparison."""

    def __init__(self, grid: Grid, session: Session, stale: float, archive: Path | None):
        self._grid, self._session, self._stale, self._archive = grid, session, stale, archive
        self._sessions: dict[tuple[str, int, int], Session] = {}
        self._donors: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in grid.cells():
            if (stage := grid.first_stage(cell)) is not None:
                self._donors.setdefault(stage, []).append(cell)

    def run(self, cells: Sequence[Cell], wait: bool) -> None:
        """Runs cells until each is finished, has failed or, without `wait`, is another process's."""
        for cell in self._those(cells, status.finished):
            self._run(cell)  # looked at first: one of other settings is refused before anything is trained
        pending = self._those(cells, lambda cell: not self._settled(cell))
        last_line = ""
        while pending:
            left = [cell for cell in pending if not self._try(cell)]
            if len(left) == len(pending):
                owners = hosts.decide(partial(self._owners, left), "the owners of the cells")
                line = f"{'Waiting for' if wait else 'Left to'} other processes: {', '.join(owners)}."
                if line != last_line:
                    print(line, flush=True)
                    last_line = line
                if not wait:
                    return
                _pause(min(60.0, self._stale / 10))
            pending = left

    def _those(self, cells: Sequence[Cell], condition: Callable[[Cell], bool]) -> list[Cell]:
        """The cells of which something holds, as host 0 sees it."""
        found = hosts.decide(lambda: [i for i, cell in enumerate(cells) if condition(cell)], "the state of the cells")
        return [cells[i] for i in found]

    def _try(self, cell: Cell) -> bool:
        """Settles a cell; returns False where that has to wait for another process."""
        with contextlib.ExitStack() as leases:
            verdict = hosts.decide(lambda: self._take(cell, leases), "who runs a cell")
            if verdict == "run":
                self._attempt(cell)
        if verdict == "run":
            if self._archive:
                keep(self._grid, self._archive, [cell])
            publish(self._grid, self._stale)
        return verdict != "wait"

    def _take(self, cell: Cell, leases: contextlib.ExitStack) -> str:
        """What to do about a cell: "run", whose lease goes into `leases`, "wait", or nothing as it is "settled"."""
        if self._settled(cell):
            return "settled"
        if self._awaits_stage(cell) or not leases.enter_context(hold(cell.folder, self._stale)):
            return "wait"
        if self._settled(cell):  # by the process that held it until now
            return "settled"
        print(f"==== {self._progress(cell)} ====", flush=True)
        (cell.folder / status.FAILED).unlink(missing_ok=True)
        return "run"

    def _attempt(self, cell: Cell) -> None:
        """Runs a cell; what it fails with is written down, and the other cells go on."""
        try:
            self._run(cell)
        except (UserError, PreemptedError, HostError, TakenOverError, StorageError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and (error.errno in OF_ALL_CELLS or not cell.folder.is_dir()):
                raise
            lasting = isinstance(error, TrainingError)  # it would end in the same way again
            if not lasting and hosts.count() > 1:
                raise  # the other hosts may know nothing of it
            if not lasting:
                traceback.print_exc()
            message = str(error) if lasting else f"{type(error).__name__}: {error}"
            status.write_failure(self._grid, cell, message, lasting)
            print(f"{cell} failed: {message}", flush=True)

    def _run(self, cell: Cell) -> None:
        hosts.decide(lambda: self._share(cell), "a shared stage")
        run_method(self._session_of(cell), cell.folder, cell.method, self._grid.tuning_of(cell))

    def _share(self, cell: Cell) -> None:
        donor = self._donor(cell)
        if donor is not None and not status.finished(cell):
            for name in self._first_folders(cell):
                share_stage(donor.folder, cell.folder, name)

    def _session_of(self, cell: Cell) -> Session:
        """The session of a cell's experiment; those of one task and seed are kept, with the base model's scores."""
        key = (cell.task, cell.seed, cell.shots)
        if key not in self._sessions:
            self._sessions = {known: one for known, one in self._sessions.items() if known[:2] == key[:2]}
            self._sessions[key] = with_experiment(self._session, self._grid.experiment_of(cell))
        return self._sessions[key]

    def _settled(self, cell: Cell) -> bool:
        if status.finished(cell):
            return True
        failure = status.failure(self._grid, cell)
        return failure is not None and failure.lasting

    def _donor(self, cell: Cell) -> Cell | None:
        """The first cell of the grid that has, or will have, the same first stage, if that is not this one.

        A cell from an archive is settled, and has no stage.
        """
        stage = self._grid.first_stage(cell)
        names = self._first_folders(cell) if stage else []
        for one in self._donors[stage] if stage else ():
            there = [stage_folder.describe(one.folder / name) for name in names]
            if one == cell or all(there) or not self._settled(one):
                return None if one == cell else one
        return None

    def _awaits_stage(self, cell: Cell) -> bool:
        """Whether another process is training the stage that this cell shares."""
        donor = self._donor(cell)
        if donor is None or self._settled(donor):
            return False
        names = self._first_folders(cell)
        there = (any(stage_folder.describe(one.folder / name) for one in (cell, donor)) for name in names)
        return not all(there) and bool(self._owner(donor))

    def _first_folders(self, cell: Cell) -> list[str]:
        """Where a cell's first stage lies in its folder: in one of each task that it trains a prompt for by itself."""
        stage = self._grid.tuning_of(cell).method(cell.method).stages[0]
        if not stage.per_task:
            return [stage.name]
        from promot_jax.data.examples import task_names

        given = self._grid.experiment.prompt_path  # several by task are taken, not trained
        tasks = task_names(cell.trained_task)
        return [f"{stage.name}/{task}" for task in tasks if isinstance(given, str) or task not in given]

    def _owner(self, cell: Cell) -> str:
        return owner(cell.folder, self._stale)

    def _owners(self, cells: Sequence[Cell]) -> list[str]:
        return [f"{cell} ({self._owner(cell) or 'after its first stage'})" for cell in cells]

    def _progress(self, cell: Cell) -> str:
        """`3 of 12: promot, rte, seed 0; about 40 min left`, by the time that finished cells of each method took."""
        cells = list(self._grid.cells())
        took: dict[str, list[float]] = {}
        for one in filter(status.finished, cells):
            took.setdefault(one.label, []).append(schema.read_run(one.folder).seconds or 0.0)
        left = [one for one in cells if not self._settled(one)]
        line = f"{len(cells) - len(left) + 1} of {len(cells)}: {cell}"
        if not took:
            return line
        mean = statistics.fmean(seconds for each in took.values() for seconds in each)
        seconds = sum(statistics.fmean(took[one.label]) if one.label in took else mean for one in left)
        return f"{line}; about {seconds / 60:.0f} min left"


def _pause(seconds: float) -> None:
    """Waits on all hosts alike; raises PreemptedError where the run is to stop meanwhile."""
    pieces = math.ceil(seconds / NOTICED)
    for _ in range(pieces):
        time.sleep(seconds / pieces)
        hosts.barrier("a pause")  # as `stops` asks for
        preemption.check("while waiting for other processes")


def _report(grid: Grid, stale: float) -> None:
    from promot_jax.report import markdown, terminal

    for found in latest(grid, stale):
        reports = {}
        for task, comparison in found.items():  # with the analyses of its cells, also those beside them
            analysed = [grid.workdir, grid.cells_folder(task)]
            reports[task] = markdown.write(comparison, grid.report_folder(task), analysed=analysed)
        if grid.tasks:
            whole = markdown.write_tasks(found, grid.workdir / grid.report, reports, analysed=_analysed(grid))
    for task, comparison in found.items():
        if grid.tasks:
            print(f"\n{task}", flush=True)
        print("\n" + terminal.table(comparison), flush=True)
        print("\n" + _next_steps(grid, comparison, reports[task]), flush=True)
    if grid.tasks:
        print(f"All tasks: {whole}", flush=True)


def _next_steps(grid: Grid, comparison: Comparison, report: Path) -> str:
    """Where the report is, and what to do with the ProMoT model, or with that of the last method."""
    from promot_jax.report import terminal

    chosen = {name: selection.chosen for name, selection in comparison.selection.items()}
    for run in sorted(comparison.runs, key=lambda run: (run.method == "promot", -run.seed), reverse=True):
        for cell in comparison.cells:
            if (cell.method, cell.seed, cell.varied) == (run.method, run.seed, chosen.get(run.method, {})):
                return terminal.next_steps(report, run, grid.workdir / cell.folder)
    return f"Report: {report.with_suffix('.html')} and {report.name}"
