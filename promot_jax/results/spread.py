"""How far scores move with the seed of a run, and in context how far with the draw of exemplars.

A run may ask every example several times, each time behind other exemplars (`Evaluation.exemplar_draws` when it ends,
`curve_draws` at every checkpoint). The two kinds of spread are told apart: the exemplars' within a seed, around its
mean over draws, and the seeds' between those means. Prompts are known to matter as much as training runs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Json = dict[str, Any]


def over_seeds_and_draws(values: Sequence[Sequence[float]]) -> Json | None:
    """Mean and spreads of one score.

    Args:
        values: per seed the scores of its draws, all on [0, 100]; seeds without any are left out.

    Returns:
        None when nothing is left, else `mean` (over seeds, of the means over draws); `ci95`, Student's interval of that
        mean over the seeds (over the draws of a single seed, which then say nothing about other seeds), None for one
        value; `low` and `high`, the range of the seeds' means; `sd_seeds`, the standard deviation between those means,
        and `sd_draws`, that of draws within a seed, pooled over seeds, each None where there is only one of the kind;
        `seeds` and `draws`, how many there are.
    """
    known = [np.asarray(draws, dtype=float) for draws in values if len(draws)]
    if not known:
        return None
    means = [float(draws.mean()) for draws in known]
    free = sum(len(draws) - 1 for draws in known)
    within = math.sqrt(sum(float(((draws - draws.mean()) ** 2).sum()) for draws in known) / free) if free else None
    return {
        "mean": math.fsum(means) / len(means),
        "ci95": _students(np.asarray(means) if len(known) > 1 else known[0]),
        "low": min(means),
        "high": max(means),
        "sd_seeds": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "sd_draws": within,
        "seeds": len(known),
        "draws": max(map(len, known)),
    }


def of_comparison(results: Json, *, key: str | None = None) -> dict[str, dict[str, Json]]:
    """Method -> "target" and numbers of shots -> spread of the target score, and of the ICL normalised averages.

    What a method has no score of is left out.

    Args:
        results: a comparison.
        key: None for the best checkpoint of each run, "matched" for that at matched target score.
    """
    found: dict[str, dict[str, Json]] = {}
    for method, runs in results["methods"].items():
        scored = [run if key is None else run.get(key) or {} for run in runs]
        values = {"target": [[(one.get("target") or {}).get("score")] for one in scored]}
        for icl in (one.get("icl") or {} for one in scored):
            for shots, entry in icl.items():
                drawn = [draw["norm_avg"] for draw in entry.get("draws") or [entry]]
                values.setdefault(shots, []).append(drawn)
        for name, by_seed in values.items():
            spread = over_seeds_and_draws([[score for score in drawn if score is not None] for drawn in by_seed])
            if spread is not None:
                found.setdefault(method, {})[name] = spread
    return found


def _students(values: np.ndarray) -> list[float] | None:
    """Student's 95 % interval of the mean of normally distributed values; None for a single one."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # a fraction of the import of scipy.stats, whose t has no interval of width 0

    half = float(stdtrit(len(values) - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]
