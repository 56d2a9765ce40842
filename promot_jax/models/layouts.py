"""How sequences of token ids are laid out as the batches of a family. NumPy only: models say which layout is theirs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One example as ids: `inputs` with its virtual prompt ids in front, `targets` with its end-of-sequence."""

    inputs: list[int]
    targets: list[int]


def decoder_rows(rows: Sequence[Sequence[Tokens]], length: int, targets: int) -> Batch:
    """Lays sequences out for a decoder-only model.

    Args:
        rows: each row's sequences, several when packed.
        length: of a row, prompt and targets included.
        targets: room for target tokens per row.

    Returns:
        `tokens`, `positions`, `segment_ids` `[batch, length]` int32 (segment 0 is padding; positions restart in each
        segment), `target_positions`, `targets` `[batch, targets]` int32 and `weights` `[batch, targets]` float32.
    """
    wide = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    goal = {name: np.zeros((len(rows), targets), np.int32) for name in ("target_positions", "targets")}
    weights = np.zeros((len(rows), targets), np.float32)
    for row, sequences in enumerate(rows):
        start = done = 0
        for segment, sequence in enumerate(sequences, 1):
            ids = [*sequence.inputs, *sequence.targets[:-1]]
            span = slice(start, start + len(ids))
            wide["tokens"][row, span] = ids
            wide["positions"][row, span] = np.arange(len(ids))
            wide["segment_ids"][row, span] = segment
            aims = slice(done, done + len(sequence.targets))
            goal["targets"][row, aims] = sequence.targets
            # The state at the last input token predicts the first target.
            goal["target_positions"][row, aims] = start + len(sequence.inputs) - 1 + np.arange(len(sequence.targets))
            weights[row, aims] = 1.0
            start, done = span.stop, aims.stop
    return {**wide, **goal, "weights": weights}
