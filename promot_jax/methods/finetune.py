"""Standard fine-tuning: trains all of the model's weights on the task, without a prompt.

Expected on the demo: target 91 on the validation split, ICL 41; 6 minutes on 2 CPU cores.
"""

from promot_jax.methods.base import Method, Stage

FINETUNE = Stage("finetune", trains=("model",))


class Finetune(Method):
    """One stage: the model."""

    name = "finetune"
    label = "fine-tuning"
    style = 0
    stages = (FINETUNE,)
