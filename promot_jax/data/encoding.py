"""Text examples to token ids for one model: tokenizer, lengths, and the virtual ids of soft prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens

if TYPE_CHECKING:
    from promot_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Binding:
    """A vocabulary and the prompts in use.

    Attributes:
        encode: text to ids.
        eos_id: ends every target.
        bos_id: starts every input, behind the prompt, or None.
        prompt_ids: `{task or mixture: virtual ids}`.
        prompt: the key in `prompt_ids` for tasks that have none of their own, or "" for none.
        continues: whether targets continue the inputs (`Model.continues`); otherwise `eos_id` ends every input too.
        sentinel_id: stands behind every input, before its EOS, or None.
    """

    encode: Callable[[str], Sequence[int]]
    eos_id: int
    bos_id: int | None
    prompt_ids: dict[str, np.ndarray]
    prompt: str = ""
    continues: bool = True
    sentinel_id: int | None = None

    def inputs(self, text: str, task: str = "") -> list[int]:
        """Ids of an input text, behind the prompt of its task."""
        virtual = self.prompt_ids.get(task, self.prompt_ids.get(self.prompt))
        start = [] if self.bos_id is None else [self.bos_id]
        end = [] if self.sentinel_id is None else [self.sentinel_id]
        end += [] if self.continues else [self.eos_id]
        return [*([] if virtual is None else virtual.tolist()), *start, *self.encode(text), *end]

    def tokens(self, example: "Example") -> Tokens:
        """Ids of an example. A target that continues its input stands one space after it.

        Raises:
            UserError: the input is empty, so that nothing stands before the first target.
        """
        inputs = self.inputs(example.inputs, example.task)
        if not inputs:
            raise UserError(f"Example {example.id!r} of task {example.task!r} has an empty input; leave it out.")
        gap = " " if self.continues and example.targets and not example.inputs[-1:].isspace() else ""
        targets = [*self.encode(gap + example.targets), self.eos_id]
        return Tokens(inputs, targets)
