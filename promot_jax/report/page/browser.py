"""What the page's browsers show: every run with its settings and curves, and what the models wrote for the same input.

All of it is in the page's HTML (`samples.html`, `runs.html`): without a script everything shows, with it there is a
search.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from promot_jax.methods import label
from promot_jax.report import figures, tables
from promot_jax.report.page.sections import Rows
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Sample

Key = tuple[str, str, int, str, str, str]  # fine-tuned on, task, seed, shots, input, target


def samples(tasks: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Inputs with the outputs of all methods: the first of every task before the second of any.

    So the first items on the page show what all tasks look like.
    """
    by_key: dict[Key, dict[str, Sample]] = {}
    for tuned_on, comparison in tasks.items():
        for method in tables.ordered(comparison.methods):
            for run in comparison.methods[method]:
                for sample in run.samples:
                    shots = "" if sample.shots is None else str(sample.shots)
                    key = (tuned_on, sample.task, run.seed, shots, sample.input, sample.target)
                    by_key.setdefault(key, {})[label(method)] = sample
    counts: Counter[tuple[Any, ...]] = Counter()
    ranks: dict[Key, tuple[int, int]] = {}
    for key in by_key:
        ranks[key] = key[2], counts[key[:4]]
        counts[key[:4]] += 1
    return [_sample(key, by_key[key]) for key in sorted(by_key, key=ranks.__getitem__)]


def _sample(key: Key, by_method: Mapping[str, Sample]) -> dict[str, Any]:
    """One input; `outputs` are (method, text, whether it is right), `shots` is "" where the results do not say."""
    named = dict(zip(("tuned_on", "task", "seed", "shots", "input", "target"), key, strict=True))
    exemplars, query = _split(key[4], next(iter(by_method.values())))
    outputs = [(method, sample.output, _is_right(sample)) for method, sample in by_method.items()]
    differ = len({text for _, text, _ in outputs}) > 1
    return named | {"exemplars": exemplars, "query": query, "outputs": outputs, "differ": differ}


def _is_right(sample: Sample) -> bool:
    # No score in older results, nor where a metric has none of one example.
    return sample.output == sample.target if sample.score is None else sample.score == 100


def _split(source: str, sample: Sample) -> tuple[str, str]:
    """Exemplars and query of an input."""
    if sample.query is not None:
        return source[: sample.query].removesuffix("\n\n"), source[sample.query :]
    exemplars, _, query = source.rpartition("\n\n") if sample.shots else ("", "", source)  # older results
    return exemplars, query


def runs(tasks: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Every run; those with settings that were not chosen follow the others of their method."""
    shown = []
    for tuned_on, comparison in tasks.items():
        for method in tables.ordered(comparison.methods):
            members = [*comparison.methods[method], *(run for run in comparison.others if run.method == method)]
            shown += [_run(tuned_on, method, run) for run in members]
    return shown


def _run(tuned_on: str, method: str, run: Run) -> dict[str, Any]:
    varied = f"{tables.varied(run.varied)}, not chosen" if run.varied else ""
    averages = {"target": run.target.score if run.target else None}
    averages |= {f"{shots}-shot": icl.norm_avg for shots, icl in run.icl.items()}
    return {
        "tuned_on": tuned_on,
        "method": label(method),
        "seed": run.seed,
        "badges": [badge for badge in (f"seed {run.seed}", tuned_on, varied) if badge],
        "averages": [f"{name} {score:.1f}" for name, score in averages.items() if score is not None],
        "chart": figures.of_run(run),
        "scores": _scores(run),
        "curve": _curve(run),
        "settings": _settings(run),
    }


def _scores(run: Run) -> Rows:
    rows = [["task", "metric", "score", "95 % interval", "format share (%)", "n"]]
    for shots, icl in run.icl.items():
        for task, score in icl.tasks.items():
            interval = " to ".join(_value(end) for end in score.ci95 or ())
            numbers = [_value(score.score), interval, _value(score.format_share), str(score.n)]
            rows.append([f"{task}, {shots}-shot", score.metric, *numbers])
    return rows


def _curve(run: Run) -> Rows:
    rows = [["stage", "step", "training loss", "validation loss", "target score", "ICL", "format share (%)"]]
    for point in run.curve:
        place = tables.place(point.step, point.alpha).removeprefix("step ")
        numbers = (point.loss, point.validation_loss, point.target, point.icl, point.format_share)
        rows.append([point.stage, place, *map(_value, numbers)])
    return rows


def _settings(run: Run) -> Rows:
    settings = {f"steps, {stage}": steps for stage, steps in run.steps.items()} | run.settings
    settings |= {"seconds": run.seconds, "model": run.model, "base": run.base, "commit": run.commit}
    settings |= {f"version of {name}": version for name, version in run.versions.items()}
    return [["setting", "value"], *([key, _value(value)] for key, value in settings.items() if value is not None)]


def _value(value: Any) -> str:
    if value is None:
        return tables.ABSENT
    return f"{value:.5g}" if isinstance(value, float) else str(value)
