"""Text to token ids for one model: tokenizer, begin and end of a sequence, and the virtual ids of soft prompts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from promot_jax.data.vocabularies import controls
from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens

if TYPE_CHECKING:
    from promot_jax.data.examples import Example
    from promot_jax.data.vocabularies.tokenizer import Vocabulary


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns text into token ids as one model reads them; training, evaluation and inference share it.

    Attributes:
        encode: text to ids.
        eos_id: ends every target.
        bos_id: starts every input, after the soft prompt, or None. An input that brings it, as a chat template's does,
            gets no second one.
        prompt_ids: virtual ids of the soft prompts, `{task or mixture: int32 [length]}` (`soft_prompts.layout`).
        prompt: the key in `prompt_ids` for tasks that have none of their own, or "" for none.
        continues: whether targets continue the inputs (`Model.continues`); otherwise `eos_id` ends every input too.
        sentinel_id: ends every input, before its EOS, or None.
    """

    encode: Callable[[str], Sequence[int]]
    eos_id: int
    bos_id: int | None
    prompt_ids: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    continues: bool = True
    sentinel_id: int | None = None

    @classmethod
    def of(cls, vocabulary: "Vocabulary", *, continues: bool) -> "Encoder":
        """The encoder of a model without soft prompts: its tokenizer, and `Model.continues`."""
        bos_id = vocabulary.bos_id if vocabulary.add_bos else None
        return cls(vocabulary.encode, vocabulary.eos_id, bos_id, continues=continues)

    def with_prompts(self, prompt_ids: Mapping[str, np.ndarray], default: str = "") -> "Encoder":
        """The encoder with soft prompts: `prompt_ids`, and in `default` the `prompt` of the attributes."""
        return dataclasses.replace(self, prompt_ids=prompt_ids, prompt=default)

    def inputs(self, text: str, task: str = "") -> list[int]:
        """Ids of an input text, with the soft prompt of its task prepended."""
        return self._framed(self.encode(text), task)

    def tokens(self, example: "Example") -> Tokens:
        """Ids of an example; a target that continues its input has the ids that it has in the text of both.

        The input's ids are always those that the model generates from, of the input alone. Where a token of the text of
        both would cross from input to target, as " True" does if the input ends in a space, the target has the ids of
        its text after a line break instead, which no tokenizer merges with a word.

        Raises:
            UserError: the input is empty, so that nothing precedes the first target.
        """
        ids = self.encode(example.inputs)
        inputs = self._framed(ids, example.task)
        if not inputs:
            raise UserError(f"Example {example.id!r} of task {example.task!r} has an empty input; leave it out.")
        return Tokens(inputs, [*self._target(example.inputs, ids, example.targets), self.eos_id])

    def continuations(self, inputs: str, targets: Sequence[str]) -> list[list[int]]:
        """Ids of several targets of one input, those that `tokens` has, without their end; with the sentinel before."""
        ids = self.encode(inputs)
        start = [] if self.sentinel_id is None else [self.sentinel_id]
        return [[*start, *self._target(inputs, ids, target)] for target in targets]

    def _target(self, inputs: str, ids: Sequence[int], target: str) -> Sequence[int]:
        """Ids of a target after an input, whose own `ids` are given."""
        target = controls.unmarked(target)
        if not self.continues:
            return self.encode(target.removeprefix(" "))
        return self._after(inputs, ids, joined(inputs, target)[len(inputs) :])

    def _framed(self, ids: Sequence[int], task: str) -> list[int]:
        virtual = self.prompt_ids.get(task, self.prompt_ids.get(self.prompt))
        end = [] if self.sentinel_id is None else [self.sentinel_id]
        end += [] if self.continues else [self.eos_id]
        return [*([] if virtual is None else virtual.tolist()), *self.start(ids), *ids, *end]

    def start(self, ids: Sequence[int]) -> list[int]:
        """What comes before the ids of a text: the BOS, unless the text brings it."""
        return [] if self.bos_id is None or list(ids[:1]) == [self.bos_id] else [self.bos_id]

    def _after(self, before: str, ids: Sequence[int], text: str) -> Sequence[int]:
        """Ids of a text after another, whose own `ids` are given."""
        for start in (before, "\n"):
            start_ids = ids if start == before else self.encode(start)
            both = self.encode(start + text)
            if list(both[: len(start_ids)]) == list(start_ids):
                return both[len(start_ids) :]
        return self.encode(text)


def joined(inputs: str, targets: str) -> str:
    """Input and target as one text: one space between them, which neither has to bring and either may.

    None is put where the input is empty or ends in white space or in a chat's control token, or the target is empty or
    starts with white space.
    """
    if not inputs or inputs[-1].isspace() or inputs[-1] == controls.END:
        return inputs + targets.removeprefix(" ")
    return inputs + ("" if not targets or targets[0].isspace() else " ") + targets
