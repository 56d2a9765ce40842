"""A step of stage 2 and of standard fine-tuning, 1,024 tokens: time and peak memory against transformers.

Stage 2 is 8 x (16 + 96 + 16) tokens with a fixed soft prompt, fine-tuning 8 x (112 + 16). All weights are trained with
AdamW, clipping, float32. SmolLM2-135M and a model of T5-small's shape.
Time: 50 minutes on two cores; --quick --pairs 1: 8 minutes.
"""

from collections.abc import Sequence

from benchmarks import models
from benchmarks.harness import Case
from benchmarks.question import MEMORY, SECONDS, Question, main
from benchmarks.step_cases import SPEED, Shape, step_case


def cases(quick: bool) -> Sequence[Case]:
    """Both stages of both models."""
    prompted, plain = Shape(8, 16, 96, 16, steps=3), Shape(8, 0, 112, 16, steps=3)
    if quick:
        prompted, plain = Shape(2, 4, 8, 4, 1, compiled=False), Shape(2, 0, 12, 4, 1, compiled=False)
    smollm2, t5 = models.decoder(quick), models.t5(quick)
    as_t5 = {"prefix": "t5_", "vocabulary": "bytes"}
    return [
        step_case("stage 2, SmolLM2-135M", "stage2", smollm2, prompted, "transformers"),
        step_case("fine-tuning, SmolLM2-135M", "finetune", smollm2, plain, "transformers"),
        step_case("stage 2, T5-small's shape", "stage2", t5, prompted, "transformers", **as_t5),
        step_case("fine-tuning, T5-small's shape", "finetune", t5, plain, "transformers", **as_t5),
    ]


QUESTION = Question("step_stage2", cases, {"seconds": SECONDS, **MEMORY, **SPEED})

if __name__ == "__main__":
    main(QUESTION)
