"""Job `precompile`: compiles a model's programs for TPUs that are not there, and says what each needs."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promot_jax import files, methods
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.settings import Experiment
from promot_jax.precompile import search as layout_search
from promot_jax.precompile.measure import measure
from promot_jax.precompile.programs import PROGRAMS, Programs
from promot_jax.precompile.summary import markdown, sent, sentence
from promot_jax.precompile.topology import topology_devices
from promot_jax.results import records
from promot_jax.training.settings import Tuning


def precompile(
    workdir: Path,
    experiment: Experiment,
    tuning: Tuning,
    topology: str | Sequence[str],
    programs: Sequence[str] = ("stage1", "stage2", "finetune", "score", "decode"),
    slices: int = 1,
    rows_per_chip: float = 0.0,
    search: bool = False,
    search_program: str = "stage2",
    trials: int = 12,
) -> None:
    """Job: compiles programs for topologies and writes `precompile.json` and `precompile.md`.

    What stands in `precompile.json` for the same settings is not compiled again. With `search`, it looks for the layout
    of the fastest step instead, and writes `search.md` and `layout.gin` (`precompile.search`).

    Args:
        workdir: of the run.
        experiment: `model` and its sizes, lengths, prompt, dtype, mesh and decoding; no checkpoint is read.
        tuning: how the stages train: batch size, optimizer, dropout.
        topology: version and chips of a TPU slice, "v4:4x4x4", "v5e:8x8"; or several, one after the other.
        programs: a training step of "stage1", "stage2", "finetune" or another stage (`methods.alone`), the "gradient"
            alone of stage 2's loss without dropout, "score" (the loss of a batch, forward only), "decode".
        slices: how many such slices, joined by a slower network.
        rows_per_chip: batch size as a multiple of the chips, instead of BATCH_SIZE; 0 keeps that.
        search: whether to search for a layout of the one topology.
        search_program: the training step whose bound ranks the layouts.
        trials: how many layouts a search compiles at most, the given one included.

    Raises:
        UserError: no model, no libtpu, an unknown topology or program, or a mesh that does not fit; a search over
            several topologies, or one that finds nothing.
        PreemptedError: between two programs.
    """
    if hosts.count() > 1:
        raise UserError("Compiling for TPUs that are not there takes one process: give the command on one host alone.")
    if experiment.model is None:
        raise UserError("Which model? Give its gin file as well, --gin_file=models/mt5_xxl.gin.")
    names = [topology] if isinstance(topology, str) else [*topology]
    for program in (*programs, search_program):
        if program not in PROGRAMS:
            raise UserError(f"Unknown program {program!r}{nearest(program, PROGRAMS)}.")
    if search and (len(names) > 1 or search_program not in methods.alone() or trials < 1):
        raise UserError(
            "A search takes one TOPOLOGY, at least one of TRIALS, and as SEARCH_PROGRAM a training step: "
            f"{', '.join(methods.alone())}."
        )
    compiled = _Compiled(workdir / "precompile.json", slices)
    if search:
        given = _lowering(experiment, tuning, names[0], slices, rows_per_chip)
        _search(workdir, given, search_program, trials, compiled)
        return
    entries = []
    for name in names:
        lowering = _lowering(experiment, tuning, name, slices, rows_per_chip)
        for program in programs:
            entries.append(compiled(lowering, program))
            print(f"[{program}] {sentence(entries[-1])}", flush=True)
    text = markdown(entries) + "\n" + sent(entries)
    print(f"\n{text}", flush=True)
    files.write_text(workdir / "precompile.md", text)


def _lowering(experiment: Experiment, tuning: Tuning, topology: str, slices: int, rows_per_chip: float) -> Programs:
    """The programs of an experiment on a topology."""
    devices = topology_devices(topology, slices)
    chips = len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})
    partitioner = dataclasses.replace(experiment.partitioner, devices=devices)
    resized = _with_batch_size(tuning, round(rows_per_chip * chips)) if rows_per_chip else tuning
    return Programs(experiment, resized, partitioner, topology, chips)


class _Compiled:
    """The figures of compiled programs, in a file: what stands there is not compiled again."""

    def __init__(self, path: Path, slices: int):
        """Reads the file if it exists; raises UserError for a damaged one."""
        self._path, self._slices = path, slices
        self._done: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._done = records.read(path, dict[str, dict[str, Any]], "delete it to compile again")

    def __call__(self, programs: Programs, program: str) -> dict[str, Any]:
        """Returns the figures of a program, compiled if it is new."""
        where = f"{self._slices} x {programs.topology}"
        key = f"{where} {program} {programs.fingerprint()}"
        if key not in self._done:
            preemption.check("between two programs")
            print(f"[{program}] compiles for {where} ...", flush=True)
            self._done[key] = measure(programs, program) | {"slices": self._slices}
            files.write(self._done, self._path)
        return self._done[key]


def _search(workdir: Path, given: Programs, program: str, trials: int, compiled: _Compiled) -> None:
    """Searches a layout, prints and writes the table of those that were compiled, and the best as a gin file."""

    def figures(programs: Programs) -> dict[str, Any]:
        print(f"[search] {layout_search.Layout.of(programs)}", flush=True)
        entry = compiled(programs, program)
        print(f"[{program}] {sentence(entry)}", flush=True)
        return entry

    started = time.monotonic()
    ranked, note = layout_search.search(given, program, trials, figures)
    text = f"{layout_search.table(ranked, layout_search.Layout.of(given))}\n{note}\n"
    print(f"\n{text}The search took {time.monotonic() - started:.0f} s.", flush=True)
    files.write_text(workdir / "search.md", text)
    best, entry = ranked[0]
    head = (
        f"# The fastest layout that a search found for {program} on {entry['slices']} x {given.topology}, batch "
        f"{entry['batch']}: at least\n# {entry['step_seconds']:.3g} s per step, {100 * entry['utilization']:.0f} % of "
        "the peak. Not a run itself: give it after the run and its model.\n"
    )
    family = type(given.experiment.model).__name__
    files.write_text(workdir / "layout.gin", head + best.gin(family))


def _with_batch_size(tuning: Tuning, rows: int) -> Tuning:
    prompt, model = (dataclasses.replace(stage, batch_size=rows) for stage in (tuning.prompt, tuning.model))
    return dataclasses.replace(tuning, prompt=prompt, model=model)
