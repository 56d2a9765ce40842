"""Runs of several methods joined to one comparison."""

from collections.abc import Iterable
from typing import Any

from promot_jax.methods import REFERENCE, is_plain
from promot_jax.results.matched_target import matched, model_tuning
from promot_jax.results.schema import check_comparison, check_run, icl_result, target_result

Json = dict[str, Any]


def comparison(runs: Iterable[Json]) -> Json:
    """Groups runs by method: `{"methods": {method: [run per seed, ascending]}}`, methods in order of appearance.

    Where several methods tune the model, each of their runs gets `matched`: its scores on the validation split at the
    checkpoint where all methods are equally good at the fine-tuned task (`promot_jax.results.matched_target.matched`).
    So do pretrained runs: what one of those methods scored before its first update. Stripped, that is the pretrained
    model; its target score counts only of methods that ask for the target as they ask the pretrained model.
    """
    methods: dict[str, list[Json]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append({key: run[key] for key in run if key != "matched"})
    methods = {name: sorted(members, key=lambda run: run["seed"]) for name, members in methods.items()}
    by_seed = {name: {run["seed"]: run for run in members} for name, members in methods.items()}
    seeds = sorted({seed for known in by_seed.values() for seed in known})
    found = matched(
        {name: [known[seed]["curve"] if seed in known else [] for seed in seeds] for name, known in by_seed.items()}
    )
    for name, matches in found.items() if len(found) > 1 else ():
        for seed, match in zip(seeds, matches, strict=True):
            if match is not None:
                by_seed[name][seed] |= _matched(by_seed[name][seed], match.step)
    for seed, before in by_seed.get(REFERENCE, {}).items():
        tuned = [runs[seed] for runs in by_seed.values() if "matched" in runs.get(seed, {})]
        begun: dict[str, Json] = {run["method"]: scores for run in tuned if (scores := _matched(run, 0))}
        plain = [scores for name, scores in begun.items() if is_plain(name)]
        stripped = [{"matched": scores["matched"] | {"target": None}} for scores in begun.values()]
        before |= next(iter(plain + stripped), {})
    return {"methods": methods}


def _matched(run: Json, step: int) -> Json:
    """`{"matched": scores}` of a run at one step of its model tuning; nothing where its curve holds no tasks."""
    point = next((point for point in model_tuning(run["curve"]) if point["step"] == step), {})
    if not run.get("target") or "tasks" not in point:
        return {}
    task, metric = run["target"]["task"], run["target"]["metric"]
    target = target_result(task, metric, point["target"], ci95=point["target_ci95"], n=point["target_n"])
    icl = {str(run["settings"]["curve_shots"]): icl_result(point["tasks"])}
    for entry in icl.values() if "draws" in point else ():
        entry["draws"] = point["draws"]
    return {"matched": {"step": step, "target": target, "icl": icl}}


def as_comparison(results: Json) -> Json:
    """A comparison as it is, a single run as the comparison that holds it alone; checked."""
    if isinstance(results, dict) and "methods" not in results and "method" in results:
        check_run(results, "the results")
        return comparison([results])
    check_comparison(results, "the results")
    return results
