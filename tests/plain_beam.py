"""T5X's beam search of one row in plain Python, with all its ended hypotheses and its rule when to end."""

from collections.abc import Callable, Generator, Sequence

import numpy as np

from promot_jax.decoding.settings import Decoding

Search = Generator[list[list[int]], np.ndarray, list[int]]


def penalty(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent


def search(settings: Decoding, limit: int, stop: int, *, transformers: bool = False) -> Search:
    """Yields its living hypotheses, is sent the log-probabilities `[hypotheses, vocab]` behind each, returns the best.

    transformers differs in two rules: a hypothesis only ends if it is among the best `beams`, not `2 * beams`; and one
    that is cut off at the limit is as good as one that has ended.
    """
    living: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        table = yield [tokens for _, tokens in living]
        totals = np.array([[score] for score, _ in living]) + table
        order = np.argsort(-totals, axis=None, kind="stable")[: 2 * settings.beams]
        candidates = [
            (float(totals[beam, token]), [*living[beam][1], int(token)])
            for beam, token in zip(*np.unravel_index(order, totals.shape), strict=True)
        ]
        ending = candidates[: settings.beams] if transformers else candidates
        ended += [
            (score / penalty(length, settings.length_penalty), tokens)
            for score, tokens in ending
            if tokens[-1] == stop or (transformers and length == limit)
        ]
        ended = sorted(ended, key=lambda one: -one[0])[: settings.beams]
        living = [one for one in candidates if one[1][-1] != stop][: settings.beams]
        if len(ended) == settings.beams and ended[-1][0] > living[0][0] / penalty(limit, settings.length_penalty):
            break
    return (ended or living)[0][1]


def side_by_side(
    searches: Sequence[Search], score: Callable[[list[tuple[int, list[int]]]], np.ndarray]
) -> list[list[int]]:
    """Runs searches together and returns what each finds.

    Args:
        searches: one per row.
        score: the log-probabilities `[n, vocab]` behind n pairs of a row and tokens behind it.
    """
    asking = {row: next(search) for row, search in enumerate(searches)}
    found: dict[int, list[int]] = {}
    while asking:
        table = score([(row, tokens) for row, hypotheses in asking.items() for tokens in hypotheses])
        start = 0
        for row, hypotheses in list(asking.items()):
            part, start = table[start : start + len(hypotheses)], start + len(hypotheses)
            try:
                asking[row] = searches[row].send(part)
            except StopIteration as end:
                found[row] = end.value
                del asking[row]
    return [found[row] for row in range(len(searches))]
