"""A batch in as few rows as it needs: the same examples per update, and little work on padding.

A training batch has rows of `TASK_FEATURE_LENGTHS`, most of which are padding where examples are short. `Packer` puts
several examples into a row, each a segment that attends to itself alone, so that losses and gradients are equal to
rounding. One or two shapes are chosen for a whole run from its first batches. A batch that fits neither keeps its own
rows: three programs are compiled, never more.

Where attention is causal, the states of a soft prompt do not depend on what follows. A packed row holds it once, with
whatever else the examples start with alike (`Tokens.prefix`).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from promot_jax.models import Model
from promot_jax.models.batch_layout import Batch, Tokens

if TYPE_CHECKING:
    from promot_jax.data.batches import TrainBatches

Row = Sequence[Tokens]

# Attention to so many positions costs as much as all linear layers.
_ATTENTION = 1024
# Longer rows than this only where examples are longer: masks and relative positions grow with the square.
_LONGEST = 512
# Least share of the work that a shape has to save, and in how many updates' time its program is compiled.
_SAVING, _COMPILING = 0.1, 50
_SHAPES = 2


class Shape(NamedTuple):
    """Sizes of a batch."""

    rows: int
    length: int  # of `tokens`: for a decoder-only model prompt, inputs and targets; for an encoder-decoder the inputs
    targets: int  # target tokens per row

    def __str__(self) -> str:
        """Rows and their length in words."""
        return f"{self.rows} row{'s' if self.rows > 1 else ''} of {self.length} tokens"

    def work(self) -> float:
        """Relative work of an update: every position passes the layers once."""
        return self.rows * (self.length * (1 + self.length / _ATTENTION) + self.targets)

    def holds(self, other: "Shape") -> bool:
        """Whether rows of another shape, no more of them, fit."""
        return all(own >= needed for own, needed in zip(self, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Packer:
    """Lays out the rows of batches for one model."""

    model: Model
    rows: int  # of an unpacked batch
    inputs: int  # input tokens of an unpacked row, prompts included
    targets: int  # target tokens of an unpacked row
    # Microbatch `i` works through the rows `i::microbatches`. It keeps its examples: a loss may compare their tokens.
    microbatches: int = 1
    devices: int = 1  # parts of the mesh that rows are split over; rows of a microbatch are a multiple of it

    @property
    def plain(self) -> Shape:
        """The shape of an unpacked batch."""
        return Shape(self.rows, self.inputs + (self.targets if self.model.continues else 0), self.targets)

    def choose(self, batches: Sequence[Sequence[Row]], steps: int = 1) -> tuple[Shape, ...]:
        """Returns the shapes with the least expected work for batches like these, by their work; `plain` is the last.

        A shape need not hold all batches: the longest cost less in another than their space would in each. With dropout
        no example changes its row: which values are dropped must not depend on the mesh.

        Args:
            batches: some of the run's; none of them gives `plain` alone.
            steps: updates of the run. A second shape has to save the time in which it is compiled.
        """
        needs = {rows: [self._needed(self._pack(batch, rows)) for batch in batches] for rows in self._numbers_of_rows()}
        candidates = [shape for needed in needs.values() for shape in self._candidates(needed)]
        fits = [(np.array(needs[shape.rows]) <= shape).all(axis=1) for shape in candidates]
        shapes, work = [self.plain], np.full(len(batches), self.plain.work())
        for number in range(_SHAPES if candidates else 0):
            saving = _SAVING if number == 0 else max(_SAVING, _COMPILING / steps)
            less = [
                np.where(fit, np.minimum(work, shape.work()), work) for shape, fit in zip(candidates, fits, strict=True)
            ]
            best = int(np.argmin(np.sum(less, axis=1)))
            if less[best].sum() > (1 - saving) * work.sum():
                break
            shapes, work = [*shapes, candidates[best]], less[best]
        return tuple(sorted(shapes, key=Shape.work))

    def layout(self, batch: Sequence[Row], shapes: Sequence[Shape]) -> Batch:
        """Returns the arrays of a batch in the first shape of `choose` that it fits."""
        packed, shape = self._fitted(batch, shapes)
        inputs = shape.length - (shape.targets if self.model.continues else 0)
        return self.model.layout(packed, inputs, shape.targets)

    def padding(self, batches: Sequence[Sequence[Row]], shapes: Sequence[Shape]) -> float:
        """Returns the share of positions that are padding where batches are laid out in these shapes, in [0, 1]."""
        fitted = [self._fitted(batch, shapes) for batch in batches]
        used = sum(self._length(row) for packed, _ in fitted for row in packed)
        return 1 - used / sum(shape.rows * shape.length for _, shape in fitted)

    def _fitted(self, batch: Sequence[Row], shapes: Sequence[Shape]) -> tuple[Sequence[Row], Shape]:
        for shape in shapes:
            if shape == self.plain:
                break
            packed = self._pack(batch, shape.rows)
            if shape.holds(self._needed(packed)):
                return packed, shape
        return batch, self.plain

    def _candidates(self, needs: Sequence[Shape]) -> Iterator[Shape]:
        """Shapes of one number of rows that hold some, or all, of what is needed."""
        needs = sorted(needs)
        for need, targets in zip(needs, itertools.accumulate((need.targets for need in needs), max), strict=True):
            shape = self._rounded_up(need._replace(targets=targets))
            if max(shape.length, shape.targets) <= max(self.plain.length, self.plain.targets, _LONGEST):
                yield shape

    def _numbers_of_rows(self) -> list[int]:
        """The numbers of rows to choose from: four steps between powers of two, times what the mesh needs."""
        unit = self.microbatches * self.devices
        if self.model.config.dropout_rate or self.rows % unit:
            return [self.rows]
        fewer = {step << power >> 2 for power in range(self.rows.bit_length() + 1) for step in (4, 5, 6, 7)}
        return [unit * rows for rows in sorted(fewer) if unit * rows < self.rows] + [self.rows]

    def _rounded_up(self, shape: Shape) -> Shape:
        """A shape rounded up; an unpacked row needs no more than `plain` has."""
        length, targets = _rounded(shape.length, 8), _rounded(shape.targets, 2)
        if shape.rows == self.rows:
            length, targets = min(length, self.plain.length), min(targets, self.targets)
        return Shape(shape.rows, max(length, targets) if self.model.continues else length, targets)

    def _needed(self, packed: Sequence[Row]) -> Shape:
        """The smallest shape that holds packed rows."""
        targets = (sum(len(tokens.targets) for tokens in row) for row in packed)
        return Shape(len(packed), max(map(self._length, packed)), max(targets))

    def _length(self, row: Row) -> int:
        """Positions that a row takes."""
        prefixes = {tuple(tokens.inputs[: tokens.prefix]) for tokens in row}
        return sum(map(len, prefixes)) + sum(map(self._own, row))

    def _own(self, tokens: Tokens) -> int:
        """Positions of an example besides its shared prefix."""
        return len(tokens.inputs) - tokens.prefix + (len(tokens.targets) - 1 if self.model.continues else 0)

    def _pack(self, batch: Sequence[Row], rows: int) -> list[Row]:
        """The examples of a batch in so many rows, shared prefixes marked; as many rows as it has stay as they are."""
        if rows == self.rows:
            return list(batch)
        parts = [
            self._fill(
                [tokens for row in batch[part :: self.microbatches] for tokens in row], rows // self.microbatches
            )
            for part in range(self.microbatches)
        ]
        return [row for together in zip(*parts, strict=True) for row in together]

    def _fill(self, examples: Sequence[Tokens], rows: int) -> list[Row]:
        """Puts examples, longest first, each into the row that is shortest with it; within a row they keep their order.

        Longest first keeps the longest row close to the mean (Graham, 1969).
        """
        if self.model.shares_prefixes:
            examples = _with_prefixes(examples)
        used = np.zeros(rows, int)
        missing = {tuple(tokens.inputs[: tokens.prefix]): np.ones(rows, bool) for tokens in examples}
        members: list[list[int]] = [[] for _ in range(rows)]
        for index in sorted(range(len(examples)), key=lambda index: -self._own(examples[index])):
            tokens = examples[index]
            absent = missing[tuple(tokens.inputs[: tokens.prefix])]
            after = used + self._own(tokens) + tokens.prefix * absent
            row = int(np.argmin(after))
            used[row], absent[row] = after[row], False
            members[row].append(index)
        return [[examples[index] for index in sorted(row)] for row in members]


class PackedBatches:
    """Batches of all rows, packed on every host alike: each reads all shards of the data, which are few examples.

    Attributes:
        parts: the streams by shard.
        shapes: of the batches, by their work; each batch has the first that it fits.
    """

    def __init__(self, parts: Mapping[int, "TrainBatches"], packer: Packer, look_ahead: int, steps: int = 1):
        """Reads the first `look_ahead` batches, from which the shapes are chosen.

        Args:
            parts: streams of all shards, in their order.
            packer: lays out their rows.
            look_ahead: batches, at least one; a function of the run's settings, as the shapes have to be.
            steps: updates of the run.
        """
        self.parts, self._packer = parts, packer
        streams = zip(*(part.rows() for part in parts.values()), strict=True)
        self._batches = ([row for rows in batch for row in rows] for batch in streams)
        self._first = list(itertools.islice(self._batches, look_ahead))
        self.shapes = packer.choose(self._first, steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches from step 0 on."""
        for batch in itertools.chain(self._first, self._batches):
            yield self._packer.layout(batch, self.shapes)

    def summary(self) -> str:
        """Returns a sentence about the shapes, and how much of them is padding."""
        *packed, plain = self.shapes
        before, after = (f"{100 * self._packer.padding(self._first, some):.0f} %" for some in ((plain,), self.shapes))
        if not packed:
            return f"batches run in {plain} ({before} of them padding); packing would save little"
        shown = " or ".join(map(str, packed))
        return f"batches run in {shown} instead of {plain} ({after} instead of {before} of them padding)"


def _rounded(size: int, least: int) -> int:
    """A size rounded up to one of sixteen steps between powers of two, so that like runs share compiled programs."""
    step = max(least, 1 << max(size.bit_length() - 5, 0))
    return -(-size // step) * step


def _with_prefixes(examples: Sequence[Tokens]) -> list[Tokens]:
    """Marks what all examples of a batch that start with the same token have in common, their soft prompt for one."""
    inputs: dict[int, list[list[int]]] = {}
    for tokens in examples:
        inputs.setdefault(tokens.inputs[0], []).append(tokens.inputs)
    prefixes = {first: _common(group) if len(group) > 1 else 0 for first, group in inputs.items()}
    return [dataclasses.replace(tokens, prefix=prefixes[tokens.inputs[0]]) for tokens in examples]


def _common(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix that leaves each sequence a token of its own."""
    first, last = min(sequences), max(sequences)  # what these two share lies in all between
    most = min(map(len, sequences)) - 1
    return next((index for index in range(most) if first[index] != last[index]), most)
