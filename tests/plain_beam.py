"""T5X's beam search of one row in plain Python, with all its finished hypotheses and its stopping rule."""

from collections.abc import Callable, Generator, Sequence

import numpy as np

from promot_jax.decoding.settings import Decoding

Search = Generator[list[list[int]], np.ndarray, list[int]]


def penalty(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent


def search(settings: Decoding, limit: int, stop: int, *, transformers: bool = False) -> Search:
    """Yields live hypotheses, receives their next log-probabilities `[hypotheses, vocab]`, returns the best.

    transformers differs in two rules: a hypothesis finishes only among the best `beams`, not `2 * beams`; and a
    hypothesis that reaches the limit is finished too.
    """
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        table = yield [tokens for _, tokens in live]
        totals = np.array([[score] for score, _ in live]) + table
        order = np.argsort(-totals, axis=None, kind="stable")[: 2 * settings.beams]
        candidates = [
            (float(totals[beam, token]), [*live[beam][1], int(token)])
            for beam, token in zip(*np.unravel_index(order, totals.shape), strict=True)
        ]
        ending = candidates[: settings.beams] if transformers else candidates
        finished += [
            (score / penalty(length, settings.length_penalty), tokens)
            for score, tokens in ending
            if tokens[-1] == stop or (transformers and length == limit)
        ]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[: settings.beams]
        live = [(score, tokens) for score, tokens in candidates if tokens[-1] != stop][: settings.beams]
        if len(finished) == settings.beams and finished[-1][0] > live[0][0] / penalty(limit, settings.length_penalty):
            break
    return (finished or live)[0][1]


def side_by_side(
    searches: Sequence[Search], score: Callable[[list[tuple[int, list[int]]]], np.ndarray]
) -> list[list[int]]:
    """Runs searches together and returns the result of each.

    Args:
        searches: one per row.
        score: the log-probabilities `[n, vocab]` after n pairs of a row and the tokens that follow it.
    """
    running = {row: next(search) for row, search in enumerate(searches)}
    results: dict[int, list[int]] = {}
    while running:
        table = score([(row, tokens) for row, hypotheses in running.items() for tokens in hypotheses])
        start = 0
        for row, hypotheses in list(running.items()):
            part, start = table[start : start + len(hypotheses)], start + len(hypotheses)
            try:
                running[row] = searches[row].send(part)
            except StopIteration as end:
                results[row] = end.value
                del running[row]
    return [results[row] for row in range(len(searches))]
