"""Fine-tuning with a fixed random prompt (ablation of the ProMoT paper, arXiv 2211.00635): is any prompt enough?

The prompt is uniform in `[-PromptInit.scale, PromptInit.scale]`, is never trained, is saved beside the model, and is
removed in context.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage


class RandomPrompt(Method):
    """One stage: the model, with the fixed prompt prepended."""

    name = "random_prompt"
    label = "fixed random prompt"
    stages = (Stage("random_prompt", trains=("model",), prompt=True, fixed_prompt="uniform"),)
