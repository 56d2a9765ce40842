"""A step of stage 1, 8 x (16 + 112 + 16) tokens: time and peak memory against peft's prompt tuning.

Same weights, same rows, same first prompt, AdamW, clipping. SmolLM2-135M and a model of T5-small's shape.
Time: 25 minutes on two cores; --quick --pairs 1: 4 minutes.
"""

from collections.abc import Sequence

from benchmarks import models
from benchmarks.harness import Case
from benchmarks.question import MEMORY, SECONDS, Question, main
from benchmarks.step_cases import SPEED, Shape, step_case


def cases(quick: bool) -> Sequence[Case]:
    """SmolLM2 and T5."""
    shape = Shape(2, 4, 12, 4, steps=1, compiled=False) if quick else Shape(8, 16, 112, 16, steps=3)
    return [
        step_case("stage 1, SmolLM2-135M", "stage1", models.decoder(quick), shape, "peft"),
        step_case(
            "stage 1, T5-small's shape", "stage1", models.t5(quick), shape, "peft", prefix="t5_", vocabulary="bytes"
        ),
    ]


QUESTION = Question("step_stage1", cases, {"seconds": SECONDS, **MEMORY, **SPEED})

if __name__ == "__main__":
    main(QUESTION)
