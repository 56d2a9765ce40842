"""Multi-task fine-tuning (ProMoT paper, arXiv 2211.00635, multi-task table): one model on a mixture, without a prompt.

MIXTURE_OR_TASK_NAME names the mixture, `movie_and_tweets` on the demo.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage


class MultitaskFinetune(Method):
    """One stage: the model, on all tasks."""

    name = "multitask_finetune"
    label = "multi-task fine-tuning"
    needs_mixture = True
    stages = (Stage("finetune", trains=("model",)),)
