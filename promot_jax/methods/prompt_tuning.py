"""Prompt tuning (Lester et al., 2021, arXiv 2104.08691): trains a soft prompt on a frozen model.

The prompt is a matrix of embeddings `[length, embed]`, prepended to every input of the task. Without it the model is
the pretrained one, so nothing of its in-context learning is lost. It is stage 1 of ProMoT.

Expected on the demo: target 90 on the validation split; 8 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage

STAGE1 = Stage("stage1", trains=("prompt",), prompt=True)


class PromptTuning(Method):
    """One stage: the prompt."""

    name = "prompt_tuning"
    label = "prompt tuning"
    style = 2
    stages = (STAGE1,)
