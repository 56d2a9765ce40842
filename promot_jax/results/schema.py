"""`results.json`: what a run leaves behind, as plain dictionaries.

One run::

    {"method": "promot", "seed": 0, "steps": {"stage1": 100, "stage2": 60}, "seconds": 412.0,
     "target": {"task": ..., "metric": ..., "score": 91.2, "ci95": [88.0, 94.1], "n": 400},
     "icl": {"1": {"norm_avg": 41.3, "ci95": [...], "format_share": 3.2, "tasks": {"capital": {"metric": "exact_match",
             "score": 55.0, "ci95": [...], "n": 100, "format_share": 0.0}, ...}}, "4": {...}},
     "curve": [{"step": 20, "stage": "stage2", "loss": ..., "target": ..., "icl": ..., "format_share": ...}, ...],
     "versions": {...}, "commit": ...}

A comparison is `{"methods": {"pretrained": [<one run per seed>], "finetune": [...], ...}}`. All scores are on [0, 100];
a number that does not exist (a NaN loss, the format share of an open task) is null. Further keys are allowed
everywhere. Those with a meaning to `promot_jax.report` are `model`, `settings`, `samples` and `matched` (see there); in
an entry of `icl`, `draws` (a `draw_result` for each draw of exemplars); in the `target` of a mixture, `tasks` (a
`task_result` for each of them); and in a comparison those of `promot_jax.sweep.collect.collect`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promot_jax import methods
from promot_jax.errors import UserError, nearest
from promot_jax.files import plain
from promot_jax.results.bootstrap import normalized_average
from promot_jax.results.provenance import commit, versions

Json = dict[str, Any]


def task_result(
    metric: str, score: float | None, *, ci95: Sequence[float] | None, n: int, format_share: float | None = None
) -> Json:
    """One ICL task: its metric's name, score and interval on [0, 100], number of examples, format share in percent."""
    return {"metric": metric, "score": score, "ci95": ci95, "n": n, "format_share": format_share}


def target_result(task: str, metric: str, score: float | None, *, ci95: Sequence[float] | None, n: int) -> Json:
    """The fine-tuned task: its name, its metric's name, score and interval on [0, 100], number of examples."""
    return {"task": task, "metric": metric, "score": score, "ci95": ci95, "n": n}


def icl_result(tasks: Mapping[str, Json], *, ci95: Sequence[float] | None = None) -> Json:
    """ICL at one number of shots: the tasks, their normalised average and mean format share (tasks weigh the same).

    Args:
        tasks: task name -> `task_result(...)`.
        ci95: interval of the normalised average (`bootstrap.average_interval`), on [0, 100].

    Returns:
        `{"norm_avg", "ci95", "format_share", "tasks"}`; `norm_avg` is None unless every task has a score,
        `format_share` is None unless every task has one.
    """
    scores = {name: task["score"] for name, task in tasks.items()}
    shares: list[Any] = [task.get("format_share") for task in tasks.values()]
    return {
        "norm_avg": normalized_average(scores) if scores and all(map(_is_number, scores.values())) else None,
        "ci95": ci95,
        "format_share": sum(shares) / len(shares) if shares and all(map(_is_number, shares)) else None,
        "tasks": dict(tasks),
    }


def draw_result(entry: Json) -> Json:
    """The scores of one draw of exemplars out of an `icl_result`, without intervals: an item of its `draws`."""
    scores = {name: task["score"] for name, task in entry["tasks"].items()}
    return {"norm_avg": entry["norm_avg"], "format_share": entry["format_share"], "tasks": scores}


def curve_point(
    step: int,
    stage: str,
    *,
    loss: float | None = None,
    target: float | None = None,
    icl: float | None = None,
    format_share: float | None = None,
) -> Json:
    """One evaluation during training: scores on the validation split, `step` counted from the start of its stage."""
    return {"step": step, "stage": stage, "loss": loss, "target": target, "icl": icl, "format_share": format_share}


def run_result(
    method: str,
    seed: int,
    steps: Mapping[str, int],
    seconds: float,
    target: Json | None,
    icl: Mapping[str, Json],
    curve: Sequence[Json],
    **extra: Any,
) -> Json:
    """Assembles one run, adds versions and commit, and checks it.

    Args:
        method: `pretrained`, `finetune`, `promot`, ...
        seed: of the whole run.
        steps: updates per stage; empty for the pretrained model.
        seconds: wall-clock time of training and evaluation.
        target: `target_result(...)`, None where the target task was not evaluated.
        icl: shots as text ("1", "4") -> `icl_result(...)`.
        curve: `curve_point(...)`s in order.
        **extra: further keys (hash of the base model, settings, matched checkpoint, ...).

    Raises:
        UserError: the run is not in the layout of this module.
    """
    fixed = {"method": method, "seed": seed, "steps": dict(steps), "seconds": seconds}
    scores = {"target": target, "icl": dict(icl), "curve": list(curve)}
    run: Json = plain({**fixed, **scores, "versions": versions(), "commit": commit(), **extra})
    check_run(run, f"the run {method!r}")
    return run


def read(path: str | os.PathLike[str]) -> Json:
    """Reads and checks a run or a comparison.

    Args:
        path: the file, or the folder of a run that has a `results.json`.

    Raises:
        UserError: there is no such file, or it is not in the layout of this module.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"There is no results file {str(path)!r}: run the job that writes it first.") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{str(path)!r} cannot be read as JSON results: {' '.join(str(error).split())}.") from None
    if isinstance(results, dict) and "methods" in results:
        check_comparison(results, repr(str(path)))
    else:
        check_run(results, repr(str(path)))
    return results


def check_comparison(results: Any, origin: str) -> None:
    """Checks the layout of a comparison; raises a UserError that names `origin` and the place in it."""
    methods = _object(results, origin, "the whole file").get("methods")
    for method, runs in _object(methods, origin, "methods").items():
        seeds = set()
        for index, run in enumerate(_typed(runs, list, origin, f"methods.{method}")):
            place = f"methods.{method}[{index}]"
            check_run(run, origin, place + ".")
            _require(run["method"] == method, origin, f"{place}.method", f"{method!r}", run["method"])
            _require(run["seed"] not in seeds, origin, f"{place}.seed", "a seed of its own", run["seed"])
            seeds.add(run["seed"])


def check_run(run: Any, origin: str, place: str = "") -> None:
    """Checks the layout of one run; raises a UserError that names `origin` and the place in it."""
    run = _object(run, origin, place.rstrip(".") or "the whole file")
    for key in ("method", "seed", "steps", "target", "icl", "curve"):
        if key not in run:
            raise UserError(f"{origin} is not in the layout of results.json: {place}{key} is missing.")
    _typed(run["method"], str, origin, place + "method")
    _count(run["seed"], origin, place + "seed")
    for stage, steps in _object(run["steps"], origin, place + "steps").items():
        _count(steps, origin, f"{place}steps.{stage}")
    for key in ("settings", "versions"):
        _object(run.get(key), origin, place + key, optional=True)
    _number(run.get("seconds"), origin, place + "seconds")
    _check_scores(run, origin, place)
    if run.get("matched") is not None:
        _count(_object(run["matched"], origin, place + "matched").get("step"), origin, place + "matched.step")
        _check_scores(run["matched"], origin, place + "matched.")
    for index, point in enumerate(_typed(run["curve"], list, origin, place + "curve")):
        _check_point(point, origin, f"{place}curve[{index}]")
    samples = [] if run.get("samples") is None else run["samples"]
    for index, sample in enumerate(_typed(samples, list, origin, place + "samples")):
        where = f"{place}samples[{index}]"
        for key in ("task", "input", "target", "output"):
            _typed(_object(sample, origin, where).get(key), str, origin, f"{where}.{key}")
        _score(sample.get("score"), origin, f"{where}.score")
        _count(sample.get("query", 0), origin, f"{where}.query")


def _check_scores(run: Json, origin: str, place: str) -> None:
    target = run.get("target")
    if target is not None:
        _typed(_object(target, origin, place + "target").get("task"), str, origin, place + "target.task")
        _check_score_entry(target, origin, place + "target")
        for name, task in _object(target.get("tasks"), origin, place + "target.tasks", optional=True).items():
            where = f"{place}target.tasks.{name}"
            _check_score_entry(_object(task, origin, where), origin, where)
    for shots, entry in _object(run.get("icl"), origin, place + "icl", optional=True).items():
        where = f"{place}icl.{shots}"
        _require(shots.isdecimal(), origin, where, "keyed by a number of shots", shots)
        for key in ("norm_avg", "format_share"):
            _score(_object(entry, origin, where).get(key), origin, f"{where}.{key}")
        _interval(entry.get("ci95"), origin, where + ".ci95")
        for name, task in _object(entry.get("tasks"), origin, where + ".tasks").items():
            _check_score_entry(_object(task, origin, f"{where}.tasks.{name}"), origin, f"{where}.tasks.{name}")


def _check_score_entry(entry: Json, origin: str, place: str) -> None:
    _typed(entry.get("metric"), str, origin, place + ".metric")
    for key in ("score", "format_share"):
        _score(entry.get(key), origin, f"{place}.{key}")
    _interval(entry.get("ci95"), origin, place + ".ci95")
    _count(entry.get("n"), origin, place + ".n")


def _check_point(point: Any, origin: str, place: str) -> None:
    stage = _object(point, origin, place).get("stage")
    _count(point.get("step"), origin, place + ".step")
    if stage not in (known := methods.stage_names()):
        raise UserError(f"{origin} has the unknown stage {stage!r} at {place}{nearest(str(stage), known)}.")
    for key in ("target", "icl", "format_share"):
        _score(point.get(key), origin, f"{place}.{key}")
    _number(point.get("loss"), origin, place + ".loss")


def _object(value: Any, origin: str, place: str, *, optional: bool = False) -> Json:
    found: Json = _typed({} if value is None and optional else value, dict, origin, place)
    return found


def _typed(value: Any, kind: type, origin: str, place: str) -> Any:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    _require(isinstance(value, kind), origin, place, names[kind], value)
    return value


def _count(value: Any, origin: str, place: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    _require(whole, origin, place, "a whole number of at least 0", value)


def _score(value: Any, origin: str, place: str) -> None:
    fits = value is None or (_is_number(value) and 0 <= value <= 100)
    _require(fits, origin, place, "null or a number from 0 to 100", value)


def _interval(value: Any, origin: str, place: str) -> None:
    pair = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    _require(value is None or (pair and value[0] <= value[1]), origin, place, "[low, high] or null", value)


def _number(value: Any, origin: str, place: str) -> None:
    _require(value is None or _is_number(value), origin, place, "null or a number", value)


def _require(condition: bool, origin: str, place: str, wanted: str, found: Any) -> None:
    if not condition:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UserError(f"{origin} is not in the layout of results.json: {place} should be {wanted}, but is {shown}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
