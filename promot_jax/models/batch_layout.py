"""Builds the training batches of a model family from sequences of token ids, as NumPy arrays."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One example as ids: `inputs` starts with the virtual ids of its prompt, `targets` ends with end-of-sequence."""

    inputs: list[int]
    targets: list[int]
    # So many of the first inputs stand in a row only once, for all sequences of the row that start with the same ones:
    # with causal attention their states are the same in each. Fewer than all inputs.
    prefix: int = 0


def decoder_rows(rows: Sequence[Sequence[Tokens]], length: int, targets: int) -> Batch:
    """Returns the batch of a decoder-only model.

    Args:
        rows: the sequences of each row, several if packed.
        length: of a row, prompt and targets included.
        targets: target tokens per row.

    Returns:
        `tokens`, `positions`, `segment_ids`, `prefix_ids` `[batch, length]` int32 (segment 0 is padding; positions
        restart in each segment), `target_positions`, `targets` `[batch, targets]` int32 and `weights`
        `[batch, targets]` float32. A shared prefix (`Tokens.prefix`) is a segment of its own, in front of the segments
        that go on from it. `prefix_ids` names the segment that a position attends to besides its own: the prefix that
        its segment goes on from, else its own segment again.
    """
    batch = _zeros(len(rows), length, "tokens", "positions", "segment_ids", "prefix_ids")
    batch |= _zeros(len(rows), targets, "target_positions", "targets")
    batch["weights"] = np.zeros((len(rows), targets), np.float32)
    for row, sequences in enumerate(rows):
        start = target_start = 0
        for segment, part in enumerate(_parts(sequences), 1):
            span = slice(start, start + len(part.ids))
            batch["tokens"][row, span] = part.ids
            batch["positions"][row, span] = part.position + np.arange(len(part.ids))
            batch["segment_ids"][row, span] = segment
            batch["prefix_ids"][row, span] = part.prefix or segment
            target_span = slice(target_start, target_start + len(part.targets))
            batch["targets"][row, target_span] = part.targets
            # The state at the last input token predicts the first target, that at the last token the last one.
            batch["target_positions"][row, target_span] = span.stop - len(part.targets) + np.arange(len(part.targets))
            batch["weights"][row, target_span] = 1.0
            start, target_start = span.stop, target_span.stop
    return batch


class _Part(NamedTuple):
    """A segment of a row."""

    ids: Sequence[int]
    position: int  # of the first
    prefix: int  # number of the segment that it goes on from, 0 for none
    targets: Sequence[int]  # none for a shared prefix


def _parts(sequences: Sequence[Tokens]) -> Iterator[_Part]:
    """The segments of a row, numbered from 1: each sequence, and each shared prefix in front of its first sequence."""
    prefixes: dict[tuple[int, ...], int] = {}  # ids to segments
    count = 0
    for sequence in sequences:
        shared = tuple(sequence.inputs[: sequence.prefix])
        if shared and shared not in prefixes:
            count += 1
            prefixes[shared] = count
            yield _Part(shared, 0, 0, ())
        count += 1
        ids = [*sequence.inputs[len(shared) :], *sequence.targets[:-1]]
        yield _Part(ids, len(shared), prefixes.get(shared, 0), sequence.targets)


def encoder_decoder_rows(rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
    """Returns the batch of an encoder-decoder model.

    Args:
        rows: the sequences of each row, several if packed.
        inputs: input tokens per row, prompts included.
        targets: target tokens per row.

    Returns:
        `tokens`, `segment_ids` `[batch, inputs]` int32 for the encoder; `decoder_tokens` (the targets shifted right,
        starting with id 0 in each segment), `decoder_segment_ids`, `targets` `[batch, targets]` int32, and `weights`
        `[batch, targets]` float32. Segment 0 is padding. Segments are contiguous, so that the distance of two slots is
        their relative position.
    """
    batch = _zeros(len(rows), inputs, "tokens", "segment_ids")
    batch |= _zeros(len(rows), targets, "decoder_tokens", "decoder_segment_ids", "targets")
    for row, sequences in enumerate(rows):
        start = target_start = 0
        for segment, sequence in enumerate(sequences, 1):
            span = slice(start, start + len(sequence.inputs))
            batch["tokens"][row, span] = sequence.inputs
            batch["segment_ids"][row, span] = segment
            target_span = slice(target_start, target_start + len(sequence.targets))
            batch["decoder_tokens"][row, target_span] = [0, *sequence.targets[:-1]]
            batch["decoder_segment_ids"][row, target_span] = segment
            batch["targets"][row, target_span] = sequence.targets
            start, target_start = span.stop, target_span.stop
    return batch | {"weights": (batch["decoder_segment_ids"] > 0).astype(np.float32)}


def _zeros(rows: int, length: int, *names: str) -> Batch:
    return {name: np.zeros((rows, length), np.int32) for name in names}
