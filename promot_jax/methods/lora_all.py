"""LoRA on all linear layers (Hu et al., 2021, arXiv 2106.09685): attention and MLP, rank 16, alpha twice the rank.

What practitioners mean by LoRA today; `lora` is the original paper's choice, queries and values.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=lora_all. Macro: LORA_LEARNING_RATE.
"""

from promot_jax.methods.base import Method, Stage
from promot_jax.params.lora import Lora

SHAPE = Lora(16, 32.0, (r"model/.*attention/(query|key|value|out)/kernel", r"model/.*mlp/(wi|wi_0|wi_1|wo)/kernel"))


class LoraAll(Method):
    """One stage: LoRA, which is kept."""

    name = "lora_all"
    label = "LoRA, all layers"
    stages = (Stage("lora_all", trains=("lora",), lora=SHAPE, keeps_lora=True, optimizer="lora", freeze=()),)
