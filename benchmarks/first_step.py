"""From launch to the first update of fine-tuning, with an empty and with a warm compilation cache.

The job is `finetune.gin` with the smallest evaluation at step 0; the clock stops at its first progress line. The other
program is a bare training loop with transformers, without data or evaluation.
Time: 10 minutes on two cores; --quick --pairs 1: 2 minutes.
"""

from collections.abc import Sequence

from benchmarks import models, worker
from benchmarks.harness import FOLDER, Case, Ratio, Side
from benchmarks.question import SECONDS, Question, main

PATTERN = r"^\[finetune\] 1/"
CACHE = "PROMOT_COMPILATION_CACHE"


def cases(quick: bool) -> Sequence[Case]:
    """SmolLM2-135M; the warm cache is filled once, before the pairs."""
    folder = str(models.decoder(quick))
    job = {"command": models.training_command(INITIAL_CHECKPOINT_PATH=folder), "pattern": PATTERN, "workdir": True}
    until = "benchmarks.commands:until"
    warm = Side("ours, warm cache", until, job | {"environment": {CACHE: str(FOLDER / "cache")}})
    settings = {"folder": folder, "stage": "finetune", "rows": 8, "prompt": 0, "inputs": 48, "targets": 2, "steps": 1}
    baseline = worker.command("benchmarks.baselines:train_step", settings, "/dev/null")
    sides = (
        warm,
        Side("ours, empty cache", until, job | {"environment": {CACHE: "{scratch}/cache"}}),
        Side("transformers, bare loop", until, {"command": baseline, "pattern": "^step 1:"}),
    )
    ratios = (
        Ratio("first_step_warm_s", "seconds", sides[0].name),
        Ratio("first_step_cold_s", "seconds", sides[1].name),
        Ratio("first_step_warm_vs_transformers", "seconds", sides[0].name, sides[2].name),
    )
    return [Case("fine-tuning, SmolLM2-135M", sides, ratios, warm_up=(warm.name,))]


QUESTION = Question("first_step", cases, {"seconds": SECONDS})

if __name__ == "__main__":
    main(QUESTION)
