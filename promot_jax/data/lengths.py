"""How long a task's examples are in tokens of one tokenizer, by class: before its model is loaded."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from promot_jax.data.encoding import Encoder
from promot_jax.data.examples import POOL_ROWS, first_rows, get
from promot_jax.errors import UserError

if TYPE_CHECKING:
    from promot_jax.data.vocabularies.tokenizer import Vocabulary

ROUNDED_TO = 8  # tokens, of the length of inputs
MOST_CLASSES = 12  # that are listed


@dataclasses.dataclass(frozen=True)
class Row:
    """One example's lengths in tokens."""

    inputs: int  # with the beginning of the sequence
    targets: int  # with its end
    label: str  # its target, of a task with labels; else ""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of a split's first `POOL_ROWS` examples."""

    rows: tuple[Row, ...]
    repeated: int  # examples whose input and target are there before
    lines: int  # targets of several lines

    @property
    def longest(self) -> dict[str, int]:
        """The longest input and target, as `TASK_FEATURE_LENGTHS` has them."""
        inputs = max(row.inputs for row in self.rows)
        return {"inputs": -(-inputs // ROUNDED_TO) * ROUNDED_TO, "targets": max(row.targets for row in self.rows)}

    def left_out(self, limits: Mapping[str, int]) -> collections.Counter[str]:
        """How many examples are longer than the limits, by class."""
        return collections.Counter(row.label for row in self.rows if not _fits(row, limits))

    def classes(self) -> collections.Counter[str]:
        """How many examples each class has; an open task is the class ""."""
        return collections.Counter(row.label for row in self.rows)

    def check(self, task: str, limits: Mapping[str, int]) -> None:
        """Raises UserError for a class of which no example is short enough, and so none would be learnt."""
        left_out = self.left_out(limits)
        for label, count in self.classes().items():
            if left_out[label] < count:
                continue
            of_class = [row for row in self.rows if row.label == label]
            needed = {"inputs": min(row.inputs for row in of_class), "targets": min(row.targets for row in of_class)}
            over = [f"{needed[key]} {key[:-1]} tokens" for key in needed if needed[key] > limits[key]]
            what = f"with the label {label!r} " if label else ""
            raise UserError(
                f"No training example of task {task!r} {what}fits TASK_FEATURE_LENGTHS = {dict(limits)}: they have at "
                f"least {' and '.join(over) or 'more tokens together'}. Give more, or --gin.TASK_FEATURE_LENGTHS=None "
                "for the lengths of the data."
            )

    def sentence(self) -> str:
        """Rows, classes, repetitions and lengths as one line."""
        classes = self.classes()
        listed = ", ".join(f"{label!r} {count:,}" for label, count in sorted(classes.items())[:MOST_CLASSES])
        more = ", ..." if len(classes) > MOST_CLASSES else ""
        first = "the first " if len(self.rows) == POOL_ROWS else ""
        inputs = sorted(row.inputs for row in self.rows)
        by_class = "" if "" in classes else f" ({listed}{more})"
        return (
            f"{first}{len(self.rows):,} rows{by_class}, {self.repeated} repeated; "
            f"input tokens: median {inputs[len(inputs) // 2]}, most {inputs[-1]}; "
            f"target tokens: most {max(row.targets for row in self.rows)}"
        )


@functools.lru_cache(maxsize=64)
def measure(task: str, split: str, vocabulary: "Vocabulary", continues: bool) -> Lengths:
    """Measures the first `POOL_ROWS` examples of a split as the model is trained on them, without a soft prompt.

    Args:
        task: name of a task without shots, no mixture.
        split: one of its splits.
        vocabulary: of the model.
        continues: `Model.continues`.
    """
    encoder = Encoder.of(vocabulary, continues=continues)
    rows, seen, lines = [], set(), 0
    for example in first_rows(get(task), split):
        tokens = encoder.tokens(example)
        rows.append(Row(len(tokens.inputs), len(tokens.targets), example.targets.strip() if example.labels else ""))
        seen.add((example.inputs, example.targets))
        lines += "\n" in example.targets.strip()
    return Lengths(tuple(rows), len(rows) - len(seen), lines)


def _fits(row: Row, limits: Mapping[str, int]) -> bool:
    return row.inputs <= limits["inputs"] and row.targets <= limits["targets"]
