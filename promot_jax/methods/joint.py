"""Joint tuning (ablation of the ProMoT paper, arXiv 2211.00635): the prompt and the model are trained together.

The prompt is removed in context, as in ProMoT. The paper has one learning rate for both; `Tuning.joint_prompt_optimizer
= @prompt/Optimizer()` gives the prompt its own.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage


class Joint(Method):
    """One stage: the model and the prompt."""

    name = "joint"
    label = "joint tuning"
    stages = (Stage("joint", trains=("model", "prompt"), prompt=True, prompt_optimizer="joint_prompt"),)
