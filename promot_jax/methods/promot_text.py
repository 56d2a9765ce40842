"""ProMoT whose soft prompt starts from a text instruction: stage 1 trains the embeddings of the text's tokens.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=promot_text. Macro: PROMPT_TEXT.
"""

import dataclasses

from promot_jax.methods.base import Method, Stage, check_text
from promot_jax.methods.hard_prompt import SHORT
from promot_jax.methods.promot import STAGE1, STAGE2


@dataclasses.dataclass(frozen=True)
class PromotText(Method):
    """Two stages: the prompt from the text on, then the model with it prepended."""

    name = "promot_text"
    label = "ProMoT from text"
    prompt_text: str = SHORT  # the text

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The prompt, then the model."""
        return dataclasses.replace(STAGE1, name="stage1_text", prompt_text=self.prompt_text), STAGE2

    def check(self) -> None:
        """Raises UserError for an empty text."""
        check_text(self.name, "prompt_text", self.prompt_text)
