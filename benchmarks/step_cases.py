"""The case of a training step: ours, the other program, its loss by hand, the products alone; also in bfloat16."""

import dataclasses
from pathlib import Path

from benchmarks import machine
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import Column

SPEED = {"gflops_per_s": Column("GFLOP/s of products")}
_VARIANTS = {"as it is": {}, "torch.compile": {"compiled": True}}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a batch whose rows are full, and how many updates are measured in a process."""

    rows: int
    prompt: int
    inputs: int
    targets: int
    steps: int
    compiled: bool = True  # whether the other program is tried with torch.compile, too; it takes minutes to compile


def step_case(
    name: str, stage: str, folder: Path, shape: Shape, baseline: str, prefix: str = "", vocabulary: str = ""
) -> Case:
    """A case with its ratios `<stage>_time_vs_<baseline>_f32` and `<stage>_memory_vs_<baseline>_f32`.

    A decoder's case (no `prefix`) has those to a loss by hand and to the products alone as well, and the products' time
    over the other program's.

    Args:
        name: of the case.
        stage: "stage1", "stage2" or "finetune".
        folder: of the model.
        shape: of the batch.
        baseline: what the other program is called.
        prefix: of the ratios' keys.
        vocabulary: tokenizer for us, where the folder has none.
    """
    settings = {"folder": str(folder), "stage": stage, **dataclasses.asdict(shape)}
    variants = _VARIANTS if settings.pop("compiled") else {"as it is": {}}
    mine = settings | {"vocabulary": vocabulary}
    theirs = f"{baseline}_f32"
    sides = [
        Side("ours_f32", "benchmarks.ours:train_step", mine),
        Side(theirs, "benchmarks.baselines:train_step", settings, variants, optional=True),
    ]
    key = prefix + stage
    ratios = [Ratio(f"{key}_time_vs_{theirs}", "seconds", "ours_f32", theirs)]
    ratios += [Ratio(f"{key}_memory_vs_{theirs}", "peak_bytes", "ours_f32", theirs)]
    if not prefix:  # a decoder's head computes the logits of inputs too, unless the loss is written by hand
        by_hand, limit = "torch_by_hand_f32", "products_f32"
        sides += [Side(by_hand, "benchmarks.baselines:train_step", settings | {"target_logits": True})]
        sides += [Side(limit, "benchmarks.products:measure", settings)]
        ratios += [Ratio(f"{key}_time_vs_{other}", "seconds", "ours_f32", other) for other in (by_hand, limit)]
        ratios += [Ratio(f"{key}_products_time_vs_{theirs}", "seconds", limit, theirs)]
    if machine.fast_bfloat16():
        theirs = f"{baseline}_bf16"
        sides += [
            Side("ours_bf16", "benchmarks.ours:train_step", mine | {"dtype": "bfloat16"}),
            Side(theirs, "benchmarks.baselines:train_step", settings | {"bfloat16": True}, variants, optional=True),
        ]
        ratios += [Ratio(f"{key}_time_vs_{theirs}", "seconds", "ours_bf16", theirs)]
        ratios += [Ratio(f"{key}_memory_vs_{theirs}", "peak_bytes", "ours_bf16", theirs)]
    return Case(name, tuple(sides), tuple(ratios), agree="first_loss", tolerance=0.02)
