"""Hard prompt: ProMoT's second stage with an ordinary text instruction in the place of the soft prompt; no stage 1.

The control that the ProMoT paper lacks: if the prompt need only tell the model that this is another task, a text does,
and costs nothing to train. The text's token embeddings are prepended, are never trained, are saved as a prompt beside
the model, and are removed in context.

Commands: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=hard_prompt, hard_prompt_long,
hard_prompt_labels. Macro: HARD_PROMPT, the text of `hard_prompt`.
"""

import dataclasses

from promot_jax.methods.base import Method, Stage, check_text

SHORT = "Answer the question.\n"
LONG = (
    "Below is one example of a task. Read it carefully to the end. Then give the answer in exactly the form that the "
    "task asks for, without an explanation and without any other words.\n"
)
LABELS = "Answer with one of these words and nothing else: {labels}.\n"


def _stages(name: str, text: str) -> tuple[Stage, ...]:
    return (Stage(name, trains=("model",), prompt=True, fixed_prompt="text", prompt_text=text),)


@dataclasses.dataclass(frozen=True)
class HardPrompt(Method):
    """One stage: the model, with a text prepended."""

    name = "hard_prompt"
    label = "hard prompt"
    hard_prompt: str = SHORT  # the text

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model alone."""
        return _stages(self.name, self.hard_prompt)

    def check(self) -> None:
        """Raises UserError for an empty text."""
        check_text(self.name, "hard_prompt", self.hard_prompt)


class HardPromptLong(Method):
    """One stage: the model, with a long text prepended."""

    name = "hard_prompt_long"
    label = "hard prompt, long"
    stages = _stages(name, LONG)


class HardPromptLabels(Method):
    """One stage: the model, with a text prepended that names the labels of the task."""

    name = "hard_prompt_labels"
    label = "hard prompt, labels"
    stages = _stages(name, LABELS)
