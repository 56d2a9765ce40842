"""How cost grows with prompt length, input length, model size, batch, shots, tasks and hosts, and what is expected.

Random Llama shapes, small, so that a point takes seconds; the law is in `growth`. Hosts are not timed: the bound of a
step on TPU slices comes from the compiled program (`precompile.gin`, needs the extra `precompile`), 8 rows per chip.
Time: 20 minutes on two cores; --quick --pairs 1: 5 minutes. docs/figures/cost_*.svg are drawn from it.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Case, Side
from benchmarks.question import PEAK, SECONDS, Question, main

STEP = {"stage": "finetune", "rows": 8, "prompt": 0, "inputs": 112, "targets": 16, "layers": 4, "emb_dim": 256}
EVALUATION = {"shots": 1, "tasks": 4, "examples": 32, "layers": 4, "emb_dim": 256}
AXES: dict[str, tuple[str, Mapping[str, Any], str, Sequence[int]]] = {
    "prompt length": ("train_step", STEP | {"stage": "stage1"}, "prompt", (16, 64, 128, 256, 512)),
    "input length": ("train_step", STEP, "inputs", (64, 128, 256, 512, 1024)),
    "batch": ("train_step", STEP, "rows", (2, 4, 8, 16, 32)),
    "layers": ("train_step", STEP, "layers", (2, 4, 8, 16)),
    "width": ("train_step", STEP, "emb_dim", (128, 256, 512, 768)),
    "shots": ("evaluate", EVALUATION, "shots", (0, 1, 2, 4, 8)),
    "tasks": ("evaluate", EVALUATION, "tasks", (1, 2, 4, 8, 16)),
}
HOSTS = {1: "v4:2x2x1", 2: "v4:2x2x2", 4: "v4:2x2x4", 8: "v4:2x4x4", 16: "v4:4x4x4"}  # of four chips each


def cases(quick: bool) -> Sequence[Case]:
    """One per axis, a side per point; a quick run has the two shortest points."""
    found = []
    for axis, (function, settings, name, values) in AXES.items():
        further = {"steps": 1 if quick else 5} if function == "train_step" else {}
        points = {str(value): {**settings, **further, name: value} for value in (values[:2] if quick else values)}
        found.append(_case(axis, function, points))
    if importlib.util.find_spec("libtpu"):
        hosts = {str(count): {"topology": topology} for count, topology in HOSTS.items()}
        found.append(_case("hosts", "bound", dict(list(hosts.items())[: 2 if quick else None]), times=1))
    else:
        print("Hosts are left out: the TPU compiler needs pip install 'promot_jax[precompile]'.", flush=True)
    return found


def _case(axis: str, function: str, points: Mapping[str, Mapping[str, Any]], times: int = 0) -> Case:
    sides = tuple(Side(point, f"benchmarks.growth:{function}", settings) for point, settings in points.items())
    return Case(axis, sides, (), pairs=times)


QUESTION = Question("cost_growth", cases, {"seconds": SECONDS, "peak_bytes": PEAK})

if __name__ == "__main__":
    main(QUESTION)
