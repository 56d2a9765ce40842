"""A step of stage 1, 8 x (16 + 112 + 16) tokens: time and peak memory against peft's prompt tuning.

Same weights, same rows, same first prompt, AdamW, clipping. SmolLM2-135M and a model of T5-small's shape.
Time: 25 minutes on two cores; --quick --pairs 1: 4 minutes.
"""

from collections.abc import Sequence

from benchmarks import models
from benchmarks.harness import Case
from benchmarks.question import MEMORY, SECONDS, Question, main
from benchmarks.step_cases import Shape, step_case


def cases(quick: bool) -> Sequence[Case]:
    """SmolLM2 and T5."""
    shape = Shape(rows=8, prompt=16, inputs=112, targets=16, steps=1 if quick else 3)
    return [
        step_case("stage 1, SmolLM2-135M", "stage1", models.smollm2() / "stripped", shape, "peft"),
        step_case("stage 1, T5-small's shape", "stage1", models.t5(), shape, "peft", prefix="t5_", vocabulary="bytes"),
    ]


QUESTION = Question("step_stage1", cases, {"seconds": SECONDS, **MEMORY})

if __name__ == "__main__":
    main(QUESTION)
