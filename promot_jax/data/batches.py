"""Examples to model batches: fixed shapes for training, a few shapes by length for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from promot_jax.data.encoding import Encoder
from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Batch, Tokens

if TYPE_CHECKING:
    from promot_jax.data.examples import Example
    from promot_jax.data.replay import Replay

# Widths that evaluation batches are padded to, four from one power of two to the next: each compiles once.
WIDTHS = (24, 32, *(quarters << octave for octave in range(3, 11) for quarters in (5, 6, 7, 8)))
COARSE_WIDTHS = (24, *WIDTHS[1::2])  # where a program has two widths
MIN_ROWS = 4


class TrainBatches:
    """Fixed-shape training batches, a function of (examples, step): a resumed run sees the same batches.

    Over-long examples are left out, never cut: cutting would lose the end of the template. `skipped` counts them.
    """

    def __init__(
        self,
        examples: Iterator["Example"],
        encoder: Encoder,
        layout: Callable[[Sequence[Sequence[Tokens]], int, int], Batch],
        *,
        batch_size: int,
        feature_lengths: dict[str, int],
        pack: bool = False,
        replay: "Replay | None" = None,
        passages: Iterator[Tokens] | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        """Takes a stream of examples.

        Args:
            examples: endless.
            encoder: vocabulary and prompts.
            layout: of the model's family (`Model.layout`).
            batch_size: rows.
            feature_lengths: `inputs` and `targets` in tokens, without the prompt.
            pack: put several examples into a row, each with its own soft prompt prepended.
            replay: how often a passage replaces an example, and how long its targets may be.
            passages: of `replay.passages`, endless; None for none.
            part: `(shard, shards)`: passages alternate over all shards.

        Raises:
            UserError: `feature_lengths` lacks "inputs" or "targets", or names others.
        """
        if set(feature_lengths) != {"inputs", "targets"}:
            raise UserError(f"TASK_FEATURE_LENGTHS names {sorted(feature_lengths)}; give 'inputs' and 'targets'.")
        self.skipped = 0
        self._examples, self._encoder, self._batch_size, self._pack = examples, encoder, batch_size, pack
        self._replay, self._passages, (self._drawn, self._shards) = replay, passages, part
        self._inputs = feature_lengths["inputs"] + max((len(ids) for ids in encoder.prompt_ids.values()), default=0)
        self._targets = feature_lengths["targets"]
        self._row_targets = max(self._targets, replay.targets if replay else 0)
        self._limits = f"{feature_lengths['inputs']} inputs, {self._targets} targets"
        self._layout = layout
        self._waiting: Tokens | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches from step 0 on."""
        for rows in self.rows():
            yield self._layout(rows, *self.lengths)

    def rows(self) -> Iterator[list[list[Tokens]]]:
        """Yields the rows of batches from step 0 on, before they are laid out."""
        while True:
            yield [self._row() for _ in range(self._batch_size)]

    @property
    def lengths(self) -> tuple[int, int]:
        """Input tokens, soft prompt included, and target tokens for which a row has space."""
        return self._inputs, self._row_targets

    def _row(self) -> list[Tokens]:
        row: list[Tokens] = []
        inputs = targets = 0
        while True:
            tokens, self._waiting = self._waiting or self._next(), None
            inputs += len(tokens.inputs)
            targets += len(tokens.targets)
            if row and (inputs > self._inputs or targets > self._row_targets):
                self._waiting = tokens
                return row
            row.append(tokens)
            if not self._pack:
                return row

    def _next(self) -> Tokens:
        drawn, self._drawn = self._drawn, self._drawn + self._shards  # counted over all shards
        if self._replay is not None and self._passages is not None and self._replay.due(drawn):
            return next(self._passages)
        for _ in range(1000):
            tokens = self._encoder.tokens(next(self._examples))
            if len(tokens.inputs) <= self._inputs and len(tokens.targets) <= self._targets:
                return tokens
            self.skipped += 1
        raise UserError(
            f"1000 examples in a row are longer than TASK_FEATURE_LENGTHS ({self._limits}); the last has "
            f"{len(tokens.inputs)} and {len(tokens.targets)} tokens."
        )


class ShardedBatches:
    """Batches of all rows, from one stream per shard of the data: of B rows, row r comes from shard r * shards // B.

    The number of shards is a setting of the run, so the number of hosts changes no batch. A host opens the shards of
    its own rows; other rows are zeros, which it never reads (`Partitioner.batch`).

    Attributes:
        parts: the opened streams by shard.
    """

    def __init__(self, open_shard: Callable[[int], TrainBatches], shards: int, local_rows: np.ndarray):
        """Opens the shards that this host needs.

        Args:
            open_shard: returns a shard's batches, each of an equal part of the rows.
            shards: number of shards.
            local_rows: bool `[batch]`, the rows on this host's devices.

        Raises:
            UserError: the rows do not divide over the shards.
        """
        if len(local_rows) % shards:
            raise UserError(
                f"A batch of {len(local_rows)} rows does not divide over {shards} shards of data; change BATCH_SIZE or "
                "DATA_SHARDS."
            )
        self._shards = shards
        needed = local_rows.reshape(shards, -1).any(axis=1)
        self.parts = {shard: open_shard(shard) for shard in map(int, np.flatnonzero(needed))}

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches from step 0 on."""
        for parts in zip(*self.parts.values(), strict=True):
            empty = {name: np.zeros_like(array) for name, array in parts[0].items()}
            by_shard = dict(zip(self.parts, parts, strict=True))
            batch = [by_shard.get(shard, empty) for shard in range(self._shards)]
            yield {name: np.concatenate([part[name] for part in batch]) for name in empty}


def buckets(
    inputs: Sequence[Sequence[int]],
    budget: int,
    multiple: int = 1,
    order: Sequence[int] | np.ndarray = (),
    extra: int = 0,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Groups inputs of similar length into batches of a few fixed shapes, a width of `WIDTHS` and rows.

    A full batch has a power of two of rows. What does not fill one goes to the next width, up to a power of two; the
    last batch before that has three or four quarters of a power of two.

    Args:
        inputs: token ids per example.
        budget: tokens of a batch; wide buckets get fewer rows.
        multiple: rows are a multiple of this (the number of data shards of the mesh).
        order: one number per example; the examples of a width are sorted by it.
        extra: tokens of each row beside its input, which count for the budget alone.

    Yields:
        The indices of the examples, and `tokens` `[rows, width]`, `lengths` `[rows]`; rows after the last example are
        padding of length 0.

    Raises:
        UserError: an empty input, or one longer than the widest bucket.
    """
    lengths = np.array([len(ids) for ids in inputs], np.int32)
    check_lengths(lengths)
    ranks = np.asarray(order) if len(order) else np.zeros(len(inputs), np.int32)
    bucket = np.searchsorted(WIDTHS, lengths)
    used = np.unique(bucket)
    members = np.zeros(0, np.int64)
    for index, after in zip(used, [*used[1:], None], strict=False):
        length = WIDTHS[index]
        members = np.union1d(members, np.flatnonzero(bucket == index))
        members = members[np.lexsort((lengths[members], ranks[members]))]
        most = 1 << max(budget // (length + extra), 1).bit_length() - 1
        is_last = after is None or _octave(WIDTHS[after]) > _octave(length)
        while len(members) >= (1 if is_last else most):
            rows = -(-min(most, _rows(len(members))) // multiple) * multiple
            chosen, members = members[:rows], members[rows:]
            yield chosen, _filled([inputs[example] for example in chosen], rows, length)


def _octave(length: int) -> int:
    return (length - 1).bit_length()


def _rows(count: int) -> int:
    """Rows for what is left, of few sizes: a power of two, or three quarters of it."""
    power = 1 << (count - 1).bit_length()
    return max(MIN_ROWS, power * 3 // 4 if count <= power * 3 // 4 else power)


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    """Returns rows as one batch of the least of `COARSE_WIDTHS`: `tokens` `[rows, width]` and `lengths` `[rows]`."""
    lengths = np.array([len(ids) for ids in rows], np.int32)
    check_lengths(lengths)
    return _filled(rows, len(rows), width(lengths.max()))


def _filled(inputs: Sequence[Sequence[int]], rows: int, length: int) -> Batch:
    """Returns inputs as `tokens` `[rows, length]` and `lengths` `[rows]`; the rows after the last are padding."""
    tokens, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    for row, ids in enumerate(inputs):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return {"tokens": tokens, "lengths": lengths}


def width(length: int) -> int:
    """Returns the least of `COARSE_WIDTHS` that holds so many tokens."""
    return COARSE_WIDTHS[np.searchsorted(COARSE_WIDTHS, length)]


def check_lengths(lengths: np.ndarray) -> None:
    """Raises UserError for an empty input, or one longer than the widest bucket; `lengths` `[examples]` in tokens."""
    if lengths.size and not lengths.min():
        raise UserError("An input is empty; give at least one token.")
    if lengths.size and lengths.max() > WIDTHS[-1]:
        raise UserError(f"An input has {lengths.max()} tokens; the longest that can be evaluated has {WIDTHS[-1]}.")
