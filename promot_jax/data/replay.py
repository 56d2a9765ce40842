"""Replay: a small share of generic text among the training examples, against forgetting.

The text is a SeqIO task of the user's (`REPLAY_TASK`): what it yields as inputs and targets is read as one passage, the
first part of which is given and the rest predicted, as in language modelling. The base model's own pretraining text is
best; without a network, `editorials` of `promot_jax.tasks.demo` is real text that a package carries.
"""

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens

if TYPE_CHECKING:
    from promot_jax.data.encoding import Encoder
    from promot_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Replay:
    """What is replayed.

    Attributes:
        task: SeqIO task or mixture of generic text; its split "train" is read.
        rate: share of the training examples that are passages.
        targets: most tokens of a passage that are predicted; a batch has room for as many.
    """

    task: str
    rate: float = 0.01
    targets: int = 32

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.task:
            raise UserError("Replay needs a task of generic text: set REPLAY_TASK.")
        if not 0 < self.rate < 1 or self.targets < 1:
            raise UserError(f"Replay's rate lies between 0 and 1 and targets are at least 1, not {self}.")

    def due(self, drawn: int) -> bool:
        """Whether a passage comes next, after so many examples: of the first n, exactly floor(n * rate) are ones."""
        share = Fraction(str(self.rate))  # 0.01 itself, not the nearest binary fraction
        return int((drawn + 1) * share) > int(drawn * share)


def passages(examples: Iterator["Example"], encoder: "Encoder", inputs: int, targets: int) -> Iterator[Tokens]:
    """Yields passages as sequences: the first half given, at most `inputs` tokens of it, and what follows predicted.

    Unlike an example of a task, a passage is cut where it is too long, and its cut end is no end of sequence. No prompt
    stands in front of it.

    Raises:
        UserError: a thousand passages in a row are shorter than two tokens.
    """
    start = [] if encoder.bos_id is None else [encoder.bos_id]
    end = [] if encoder.continues else [encoder.eos_id]
    short = 0
    for example in examples:
        ids = list(encoder.encode(f"{example.inputs} {example.targets}".strip()))
        if len(ids) < 2:
            short += 1
            if short == 1000:
                raise UserError(f"The replay task {example.task!r} yields no text: 1000 passages are empty.")
            continue
        short = 0
        middle = min(len(ids) // 2, max(inputs - len(start) - len(end), 1))
        yield Tokens([*start, *ids[:middle], *end], ids[middle : middle + targets])
