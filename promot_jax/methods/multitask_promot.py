"""Multi-task ProMoT (arXiv 2211.00635, multi-task table): a prompt for each task, then one model on the mixture.

Stage 1 trains a prompt for each task of the mixture, on that task alone. Stage 2 trains the model on the mixture, each
example with its own task's prompt prepended. Prompts that PROMPT_PATH names (`{"task": "runs/..."}`) are taken from
there. MIXTURE_OR_TASK_NAME names the mixture, `movie_and_tweets` on the demo.

Expected on the demo: docs/findings/one_setting.md; 20 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage


class MultitaskPromot(Method):
    """Two stages: a prompt for each task, then the model on all."""

    name = "multitask_promot"
    label = "multi-task ProMoT"
    needs_mixture = True
    stages = (
        Stage("stage1", trains=("prompt",), prompt=True, per_task=True),
        Stage("stage2", trains=("model",), prompt=True),
    )
