"""From generated ids to the answer: stop tokens, and T5's sentinels around the answer."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def stop_mask(token_strings: Sequence[str], stop: str, *end_ids: int) -> np.ndarray:
    """Returns bool `[vocab]`: True for the tokens that end an answer, and for every one that contains the stop text."""
    mask = np.array([bool(stop) and stop in text for text in token_strings])
    mask[list(end_ids)] = True
    return mask


SENTINELS = ("<extra_id_0>", "<extra_id_1>")  # around the first span of a span-corruption output


def spelled(ids: Sequence[int], sentinels: Mapping[str, int], decode: Callable[[list[int]], str]) -> str:
    """Returns the text of ids with sentinels spelled out, one space around each; `decode` alone would drop them.

    Args:
        ids: of an output.
        sentinels: `{"<extra_id_0>": id, ...}`.
        decode: ids without sentinels to text.
    """
    names = {index: name for name, index in sentinels.items()}
    spans = itertools.groupby(ids, key=names.get)  # the key is None for a span of ordinary ids
    parts = [decode(list(span)) if name is None else " ".join(name for _ in span) for name, span in spans]
    return " ".join(part for part in parts if part)


def first_span(output: str) -> str:
    """Returns the answer in a span-corruption output: after `<extra_id_0>`, if present, and before `<extra_id_1>`."""
    _, start, rest = output.partition(SENTINELS[0])
    return (rest if start else output).split(SENTINELS[1], 1)[0].strip()
