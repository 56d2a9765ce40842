"""ProMoT with LoRA in the place of the prompt (ProMoT paper, arXiv 2211.00635, LoRA table).

Stage 1 trains LoRA on the frozen model; stage 2 freezes LoRA and trains the model with it attached; LoRA is removed in
context. The paper's ranks are 2 and 4 (`promot_lora_r2`, `promot_lora_r4`); it gives no alpha and no learning rate.

Expected on the demo: docs/findings/one_setting.md; 14 minutes on 2 CPU cores.
Macros: LORA_RANK, LORA_ALPHA, LORA_LEARNING_RATE.
"""

import dataclasses

from promot_jax.methods.base import Method, Stage
from promot_jax.params.lora import Lora


@dataclasses.dataclass(frozen=True)
class PromotLora(Method):
    """Two stages: LoRA, then the model with the frozen LoRA attached."""

    name = "promot_lora"
    label = "ProMoT with LoRA"
    rank = 0
    lora: Lora = Lora()  # its shape; the rank is that of `rank` where the method's name says one

    @property
    def stages(self) -> tuple[Stage, ...]:
        """LoRA, then the model."""
        shape = dataclasses.replace(self.lora, rank=self.rank or self.lora.rank)
        return (
            Stage("stage1_lora", trains=("lora",), lora=shape, optimizer="lora", freeze=()),
            Stage("stage2_lora", trains=("model",), lora=shape),
        )


class PromotLoraR2(PromotLora):
    """Of the paper's smaller rank."""

    name = "promot_lora_r2"
    label = "ProMoT with LoRA r=2"
    rank = 2


class PromotLoraR4(PromotLora):
    """Of the paper's larger rank."""

    name = "promot_lora_r4"
    label = "ProMoT with LoRA r=4"
    rank = 4
