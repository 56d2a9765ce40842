"""LoRA fine-tuning (Hu et al., 2021, arXiv 2106.09685): trains low-rank updates of the frozen kernels.

`kernel + alpha / rank * A @ B`, with A `[in, rank]` and B `[rank, out]`, on the kernels that `Lora.targets` matches
(queries and values, as in the paper). LoRA stays part of the model, in context too.

Expected on the demo: docs/findings/one_setting.md; 6 minutes on 2 CPU cores.
Macros: LORA_RANK, LORA_ALPHA, LORA_LEARNING_RATE.
"""

import dataclasses

from promot_jax.methods.base import Method, Stage
from promot_jax.params.lora import Lora


@dataclasses.dataclass(frozen=True)
class LoraTuning(Method):
    """One stage: LoRA."""

    name = "lora"
    label = "LoRA"
    lora: Lora = Lora()  # its shape. Rank 4 and alpha 8 are our choice.

    @property
    def stages(self) -> tuple[Stage, ...]:
        """LoRA alone, which is kept."""
        return (Stage("lora", trains=("lora",), lora=self.lora, keeps_lora=True, optimizer="lora", freeze=()),)
