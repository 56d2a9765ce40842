"""What a training step is measured on, by both sides: the same random rows, the same first prompt."""

from collections.abc import Iterator

import numpy as np

FIRST_PROMPT_ID = 5000  # the soft prompt starts as the embeddings of the ids from here on
WARM_UP = 2  # updates before those that are measured: the first compiles


def drawn_rows(vocab: int, rows: int, inputs: int, targets: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of random ids, `[rows, inputs]` and `[rows, targets]`, endlessly, the same at every call."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(3, vocab, (rows, inputs)), rng.integers(3, vocab, (rows, targets))
