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


def encoder_decoder_rows(rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
    """Lays sequences out for an encoder-decoder model.

    Args:
        rows: each row's sequences, several when packed.
        inputs: room for input tokens per row, prompts included.
        targets: room for target tokens per row.

    Returns:
        `tokens`, `segment_ids` `[batch, inputs]` int32 for the encoder; `decoder_tokens` (the targets one to the right,
        id 0 in front of each segment's), `decoder_segment_ids`, `targets` `[batch, targets]` int32, and `weights`
        `[batch, targets]` float32. Segment 0 is padding; segments lie in one piece, from which models with relative
        positions take them.
    """
    wide = {name: np.zeros((len(rows), inputs), np.int32) for name in ("tokens", "segment_ids")}
    names = ("decoder_tokens", "decoder_segment_ids", "targets")
    goal = {name: np.zeros((len(rows), targets), np.int32) for name in names}
    for row, sequences in enumerate(rows):
        start = done = 0
        for segment, sequence in enumerate(sequences, 1):
            span = slice(start, start + len(sequence.inputs))
            wide["tokens"][row, span] = sequence.inputs
            wide["segment_ids"][row, span] = segment
            aims = slice(done, done + len(sequence.targets))
            goal["decoder_tokens"][row, aims] = [0, *sequence.targets[:-1]]
            goal["decoder_segment_ids"][row, aims] = segment
            goal["targets"][row, aims] = sequence.targets
            start, done = span.stop, aims.stop
    return {**wide, **goal, "weights": (goal["decoder_segment_ids"] > 0).astype(np.float32)}
