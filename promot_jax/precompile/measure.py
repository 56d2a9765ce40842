"""What a compiled program needs per chip: memory, FLOPs, traffic, seconds; and whether the figures can be trusted."""

import re
import resource
import time
from typing import Any

import jax
import numpy as np

from promot_jax.precompile import hlo, roofline
from promot_jax.precompile.programs import Programs

Json = dict[str, Any]
# How often a training step may compute what the model asks for: layers a second time where they are recomputed.
_RECOMPUTED = {"none": 0.0, "dots": 0.15, "attention": 0.75, "mlp": 0.6, "full": 1.0}


def measure(programs: Programs, program: str) -> Json:
    """Compiles a program and returns its figures per chip; those that fail a check are left out."""
    chip = roofline.CHIPS[programs.topology.partition(":")[0]]
    mesh = programs.partitioner.mesh()
    cores = mesh.size // programs.chips
    stage = programs.stage(program)
    lowered, arguments = programs.lower(program)
    entry: Json = {
        "program": program,
        "topology": programs.topology,
        "chips": programs.chips,
        "devices": mesh.size,
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "batch": (programs.tuning.of(stage) if stage else programs.tuning.model).batch_size,
    }
    trains = stage is not None or program == "gradient"
    memory = {"optimizer": 0.0} | {name: cores * _bytes_per_device(tree) for name, tree in arguments.items()}
    # A run keeps the model it started from, in float32: every evaluation and method comes back to it.
    base = 0.0 if program == "gradient" else cores * _bytes_per_device(programs.params(with_prompt=False))
    started, busy = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), sum(memory.values()) / cores)
        if needed is None:
            raise
        memory |= {"base": base, "total": base + cores * needed}
        return entry | {"memory": memory, "verdict": roofline.verdict(memory, chip, trains)}
    entry["compile_seconds"] = time.monotonic() - started
    entry["compile_cpu_seconds"] = time.process_time() - busy
    entry["compile_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = compiled.memory_analysis()
    temporaries, outputs = sizes.temp_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    entry["device"] = {"arguments": sizes.argument_size_in_bytes, "temporaries": temporaries, "outputs": outputs}
    memory |= {"temporaries": cores * temporaries, "outputs": cores * outputs, "base": base}
    memory["total"] = base + cores * sum(entry["device"].values())
    entry |= {"memory": memory, "verdict": roofline.verdict(memory, chip, trains)}
    return entry | _figures(programs, program, compiled, chip)


def flops(programs: Programs, program: str) -> tuple[float, tuple[float, float]]:
    """FLOPs that the model asks for in a program, and how often they may be computed: at least, at most."""
    model, settings = programs.model().config, programs.experiment.evaluation.decoding
    lengths, rows = programs.experiment.lengths, programs.tuning.model.batch_size
    inputs, targets = lengths["inputs"], lengths["targets"]
    if program == "decode":
        return roofline.decoding_flops(model, rows, inputs, settings.max_tokens, settings.beams), (0.9, 1.25)
    stage = programs.stage(program)
    if stage is None or stage.prompt:
        inputs += programs.experiment.prompt_length
    if stage:
        rows = programs.tuning.of(stage).batch_size
    forward = roofline.forward_flops(model, rows, inputs, targets, targets)
    # After the forward pass: gradients of activations, and of weights where these are trained.
    passes = 1 if program == "score" else 2 if stage and "model" not in stage.trains else 3
    passes += bool(stage and stage.objective.uses_start)  # the model at the start, forward
    again = _RECOMPUTED[str(model.remat)] if program != "score" else 0.0
    return passes * forward, (0.95, 1.1 * (passes + again) / passes)


def _figures(programs: Programs, program: str, compiled: Any, chip: roofline.Chip) -> Json:
    """FLOPs, traffic and seconds of a compiled program per chip, and the checks that they fail."""
    mesh = programs.partitioner.mesh()
    cores = mesh.size // programs.chips
    text, steps = compiled.as_text(), programs.experiment.evaluation.decoding.max_tokens - 1
    cost, once = hlo.Program(text, steps).cost, hlo.Program(text, once=True).cost
    stage = programs.stage(program)
    needed, share = flops(programs, program)
    failed = roofline.checks(
        cost,
        once,
        compiled.cost_analysis(),
        compiled.memory_analysis().argument_size_in_bytes,
        needed,
        mesh.size,
        share,
        slices=len({getattr(device, "slice_index", 0) for device in mesh.devices.flat}),
        trains="model" in stage.trains if stage else program == "gradient",
    )
    if failed:
        return {"failed_checks": failed}
    bounds = roofline.bounds(cost, chip, cores)
    return {
        "failed_checks": [],
        "flops": cores * (cost.flops + cost.kernel_flops),
        "model_share": needed / (mesh.size * (cost.flops + cost.kernel_flops)),
        "bytes": cores * cost.bytes,
        "collectives": {kind: cores * sent for kind, sent in cost.collectives.items()},
        "collective_counts": dict(cost.counts),
        "network": cores * cost.network,
        **bounds,
        "utilization": needed / (programs.chips * chip.flops * bounds["step_seconds"]),
    }


def _needed(message: str, arguments: float) -> float | None:
    """Bytes that a program needs on a device, where a compiler's message says that these are too many; else None."""
    alone = re.search(r"required for HLO temporaries \(([\d.]+)([GM])\) exceeds available HBM", message)
    found = alone or re.search(r"[Uu]sed ([\d.]+)([GM]) of [\d.]+[GM] hbm", message)
    if not found:
        return None
    return float(found[1]) * {"G": 1, "M": 1 / 1024}[found[2]] * roofline.GIB + (arguments if alone else 0.0)


def _bytes_per_device(tree: Any) -> float:
    """Bytes of a tree's part on one device."""
    sizes = (np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return float(sum(sizes))
