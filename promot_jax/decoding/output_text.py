"""From generated ids to the answer: where it stops, and T5's sentinels around it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def stop_mask(token_strings: Sequence[str], stop: str, eos_id: int) -> np.ndarray:
    """Returns bool `[vocab]`: the end-of-sequence token, and every token whose text holds the stop text."""
    mask = np.array([bool(stop) and stop in text for text in token_strings])
    mask[eos_id] = True
    return mask


SENTINELS = ("<extra_id_0>", "<extra_id_1>")  # around the first span that span corruption asks for


def spelled(ids: Sequence[int], sentinels: Mapping[str, int], decode: Callable[[list[int]], str]) -> str:
    """Decodes ids with their sentinels spelled out, one space around each; `decode` alone would drop them.

    Args:
        ids: of an output.
        sentinels: `{"<extra_id_0>": id, ...}`.
        decode: ids without sentinels to text.
    """
    names = {index: name for name, index in sentinels.items()}
    parts: list[str] = []
    span: list[int] = []
    for index in ids:
        if index in names:
            parts += [decode(span), names[index]]
            span = []
        else:
            span.append(index)
    return " ".join(part for part in [*parts, decode(span)] if part)


def first_span(output: str) -> str:
    """The answer in a span-corruption output: behind `<extra_id_0>`, if it is there, and before `<extra_id_1>`."""
    _, start, rest = output.partition(SENTINELS[0])
    return (rest if start else output).split(SENTINELS[1], 1)[0].strip()
