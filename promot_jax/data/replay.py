"""Replay: a small share of generic text among the training examples, against forgetting.

The text is a SeqIO task of the user's (`REPLAY_TASK`). Its inputs and targets are read as one passage, whose first part
is given and whose rest is predicted, as in language modelling. The base model's own pretraining text is best; without a
network, `editorials` of `promot_jax.tasks.demo` is real text from a package.
"""

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from promot_jax.data.encoding import joined
from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens

if TYPE_CHECKING:
    from promot_jax.data.encoding import Encoder
    from promot_jax.data.examples import Example


@dataclasses.dataclass(frozen=True)
class Replay:
    """What is replayed."""

    task: str  # SeqIO task or mixture of generic text; its split "train" is read
    rate: float = 0.01  # share of the training examples that are passages
    targets: int = 32  # maximal number of predicted tokens of a passage, for which a batch has space

    def __post_init__(self) -> None:
        """Raises UserError for impossible values."""
        if not self.task:
            raise UserError("Replay needs a task of generic text: set REPLAY_TASK.")
        if not 0 < self.rate < 1 or self.targets < 1:
            raise UserError(f"Replay's rate lies between 0 and 1 and targets are at least 1, not {self}.")

    def due(self, drawn: int) -> bool:
        """Whether a passage comes after `drawn` examples: of the first n, exactly floor(n * rate) are passages."""
        share = Fraction(str(self.rate))  # 0.01 itself, not the nearest binary fraction
        return int((drawn + 1) * share) > int(drawn * share)


def passages(examples: Iterator["Example"], encoder: "Encoder", inputs: int, targets: int) -> Iterator[Tokens]:
    """Yields passages as sequences: the first half, at most `inputs` tokens, and up to `targets` predicted tokens.

    Unlike an example, a passage is cut if it is too long, gets no EOS after its targets, and no soft prompt. Raises
    UserError if a thousand passages in a row are shorter than two tokens.
    """
    end = [] if encoder.continues else [encoder.eos_id]
    short = 0
    for example in examples:
        ids = list(encoder.encode(joined(example.inputs, example.targets).strip()))
        if len(ids) < 2:
            short += 1
            if short == 1000:
                raise UserError(f"The replay task {example.task!r} yields no text: 1000 passages are empty.")
            continue
        short, start = 0, encoder.start(ids)
        middle = min(len(ids) // 2, max(inputs - len(start) - len(end), 1))
        yield Tokens([*start, *ids[:middle], *end], ids[middle : middle + targets])
