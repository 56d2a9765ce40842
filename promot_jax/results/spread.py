"""How far scores move with the seed of a run, and in context how far with the draw of exemplars.

A run may evaluate every example several times, each time with other exemplars (`Evaluation.exemplar_draws` at its end,
`curve_draws` at every checkpoint). The two kinds of spread are told apart: the exemplars' within a seed, around its
mean over draws, and the seeds' between those means. Prompts are known to matter as much as training runs.
"""

import math
from collections.abc import Sequence

import numpy as np

from promot_jax.results.schema import Checkpoint, Comparison, Spread


def over_seeds_and_draws(values: Sequence[Sequence[float]]) -> Spread | None:
    """Mean and spreads of one score.

    `values` are, per seed, the scores of its draws, all on [0, 100]; seeds without any are left out, None is returned
    when nothing is left.
    """
    seeds = [np.asarray(draws, dtype=float) for draws in values if len(draws)]
    if not seeds:
        return None
    means = [float(draws.mean()) for draws in seeds]
    free = sum(len(draws) - 1 for draws in seeds)
    within = math.sqrt(sum(float(((draws - draws.mean()) ** 2).sum()) for draws in seeds) / free) if free else None
    return Spread(
        mean=math.fsum(means) / len(means),
        ci95=_students(np.asarray(means) if len(seeds) > 1 else seeds[0]),
        low=min(means),
        high=max(means),
        sd_seeds=float(np.std(means, ddof=1)) if len(means) > 1 else None,
        sd_draws=within,
        seeds=len(seeds),
        draws=max(map(len, seeds)),
    )


def of_comparison(results: Comparison, checkpoint: Checkpoint = "best") -> dict[str, dict[str, Spread]]:
    """Spreads by method and score: "target", and by numbers of shots the ICL normalised averages that there are.

    `checkpoint` says of which scores.
    """
    spreads: dict[str, dict[str, Spread]] = {}
    for method, runs in results.methods.items():
        scored = [scores for run in runs if (scores := run.at(checkpoint))]
        values = {"target": [[one.target.score] for one in scored if one.target]}
        for one in scored:
            for shots, icl in one.icl.items():
                values.setdefault(shots, []).append([draw.norm_avg for draw in icl.draws] or [icl.norm_avg])
        for name, by_seed in values.items():
            spread = over_seeds_and_draws([[score for score in draws if score is not None] for draws in by_seed])
            if spread is not None:
                spreads.setdefault(method, {})[name] = spread
    return spreads


def _students(values: np.ndarray) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of normally distributed scores, within [0, 100].

    None for fewer than three: of two, 12.7 times their standard error says nothing.
    """
    if len(values) < 3:
        return None
    from scipy.special import stdtrit  # a fraction of the import of scipy.stats, whose t has no interval of width 0

    mean, half = (
        float(values.mean()),
        float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1)) / math.sqrt(len(values)),
    )
    return max(mean - half, 0.0), min(mean + half, 100.0)
