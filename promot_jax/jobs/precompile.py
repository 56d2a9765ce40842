"""Job `precompile`: compiles a model's programs for TPUs that are not there, and says what each needs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promot_jax import files
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.settings import Experiment
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
) -> None:
    """Job: compiles programs for topologies and writes `precompile.json` and `precompile.md`.

    What stands in `precompile.json` for the same settings is not compiled again.

    Args:
        workdir: of the run.
        experiment: `model` and its sizes, lengths, prompt, dtype, mesh and decoding; no checkpoint is read.
        tuning: how the stages train: batch size, optimizer, dropout.
        topology: version and chips of a TPU slice, "v4:4x4x4", "v5e:8x8"; or several, one after the other.
        programs: a training step of "stage1", "stage2", "finetune" or another stage (`methods.alone`), the "gradient"
            alone of stage 2's loss without dropout, "score" (the loss of a batch, forward only), "decode".
        slices: how many such slices, joined by a slower network.
        rows_per_chip: batch size as a multiple of the chips, instead of BATCH_SIZE; 0 keeps that.

    Raises:
        UserError: no model, no libtpu, an unknown topology or program, or a mesh that does not fit.
        PreemptedError: between two programs.
    """
    if hosts.count() > 1:
        raise UserError("Compiling for TPUs that are not there takes one process: give the command on one host alone.")
    if experiment.model is None:
        raise UserError("Which model? Give its gin file as well, --gin_file=models/mt5_xxl.gin.")
    for program in programs:
        if program not in PROGRAMS:
            raise UserError(f"Unknown program {program!r}{nearest(program, PROGRAMS)}.")
    path = workdir / "precompile.json"
    done: dict[str, dict[str, Any]] = {}
    if path.is_file():
        done = records.read(path, dict[str, dict[str, Any]], "delete it to compile again")
    entries = []
    for name in [topology] if isinstance(topology, str) else topology:
        devices = topology_devices(name, slices)
        chips = len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})
        partitioner = dataclasses.replace(experiment.partitioner, devices=devices)
        resized = _with_batch_size(tuning, round(rows_per_chip * chips)) if rows_per_chip else tuning
        lowering = Programs(experiment, resized, partitioner, name, chips)
        for program in programs:
            key = f"{slices} x {name} {program} {lowering.fingerprint()}"
            if key not in done:
                preemption.check("between two programs")
                print(f"[{program}] compiles for {slices} x {name} ...", flush=True)
                done[key] = measure(lowering, program) | {"slices": slices}
                files.write(done, path)
            print(f"[{program}] {sentence(done[key])}", flush=True)
            entries.append(done[key])
    text = markdown(entries) + "\n" + sent(entries)
    print(f"\n{text}", flush=True)
    files.write_text(workdir / "precompile.md", text)


def _with_batch_size(tuning: Tuning, rows: int) -> Tuning:
    prompt, model = (dataclasses.replace(stage, batch_size=rows) for stage in (tuning.prompt, tuning.model))
    return dataclasses.replace(tuning, prompt=prompt, model=model)
