"""The page's browsers: every run with its settings and curves, and what the models wrote, method beside method.

All of it is in the page's HTML: without a script everything shows, with it there is a search.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from promot_jax.methods.labels import label as label_of
from promot_jax.report import figures, tables
from promot_jax.report.html import Markup, tag
from promot_jax.report.page.sections import figure, grid, section

Json = dict[str, Any]
PER_PAGE = 20  # items shown at once, more on demand


def samples(tasks: Mapping[str, Json]) -> Markup | None:
    """What the models wrote for the same input, method beside method (paper, table 1 and appendix C.9)."""
    found: dict[tuple[str, str, int, str, str, str], dict[str, Json]] = {}
    for name, one in tasks.items():
        for method in tables.ordered(one["methods"]):
            for run in one["methods"][method]:
                for sample in run.get("samples") or []:
                    shots = str(sample.get("shots", ""))
                    key = (name, sample["task"], run["seed"], shots, sample["input"], sample["target"])
                    found.setdefault(key, {})[method] = sample
    if not found:
        return None
    ranks: dict[Any, int] = {}
    counts = collections.Counter[tuple[Any, ...]]()
    for key in found:
        ranks[key] = counts[key[:4]]
        counts[key[:4]] += 1
    # The first of every task before the second of any: so the first page shows what all tasks look like.
    found = {key: found[key] for key in sorted(found, key=lambda key: (key[2], ranks[key]))}
    labels = {method: label_of(method) for one in tasks.values() for method in tables.ordered(one["methods"])}
    items = [_sample(key, {labels[method]: sample for method, sample in by.items()}) for key, by in found.items()]
    names = ("tuned on", "task", "seed", "shots")
    columns = {name: [str(key[index]) for key in found] for index, name in enumerate(names)}
    controls = [_select(name, values) for name, values in columns.items()]
    differ = tag("label", tag("input", type="checkbox", name="differ"), " only where methods differ")
    note = tag("p", "What the models wrote after post-processing, as it is. ✓ marks a right one.")
    return section("samples", "Sample outputs", note, _browser([*controls, differ], items))


def _sample(key: tuple[str, str, int, str, str, str], found: Mapping[str, Json]) -> Markup:
    tuned, task, seed, shots, source, target = key
    outputs = {label: sample["output"] for label, sample in found.items()}
    before, query = _split(source, next(iter(found.values())))
    head = [tag("span", task, class_="name"), tag("span", f"seed {seed}", class_="badge")]
    head += [tag("span", f"{shots}-shot", class_="badge")] if shots else []
    exemplars = None
    if before:
        exemplars = tag("details", tag("summary", "Exemplars"), tag("pre", before))
    cells = []
    for label, text in outputs.items():
        score = found[label].get("score")  # none in older results, nor where a metric has none of one example
        right = text == target if score is None else score == 100
        mark = tag("span", " ✓", aria_label="right") if right else None
        cells.append(tag("div", tag("dt", label, mark), tag("dd", text or tag("em", "nothing")), class_="hit" * right))
    cells.insert(0, tag("div", tag("dt", "target"), tag("dd", target), class_="target"))
    marks = {"data_tuned_on": tuned, "data_task": task, "data_seed": seed, "data_shots": shots}
    marks["data_differ"] = "1" if len(set(outputs.values())) > 1 else "0"
    body = [tag("h3", Markup(" ".join(head))), exemplars, tag("pre", query), tag("dl", *cells, class_="outputs")]
    return tag("article", *body, class_="item", **marks)


def _split(source: str, sample: Json) -> tuple[str, str]:
    """Exemplars and query of an input."""
    if "query" in sample:
        return source[: sample["query"]].removesuffix("\n\n"), source[sample["query"] :]
    before, _, query = source.rpartition("\n\n") if sample.get("shots") else ("", "", source)  # older results
    return before, query


def runs(tasks: Mapping[str, Json]) -> Markup:
    """Every run: scores, curves, settings; those with settings that were not chosen as well."""
    found = []
    for name, one in tasks.items():
        others = [(run["method"], run) for run in one.get("others", [])]
        for method in tables.ordered(one["methods"]):
            chosen = [(method, run) for run in one["methods"][method]]
            found += [(name, method, run) for of, run in chosen + others if of == method]
    items = [_run(name, method, run) for name, method, run in found]
    controls = [
        _select("tuned on", [name for name, _, _ in found]),
        _select("method", [label_of(method) for _, method, _ in found]),
        _select("seed", [str(run["seed"]) for _, _, run in found]),
    ]
    return section("runs", "Runs", _browser(controls, items))


def _run(name: str, method: str, run: Json) -> Markup:
    label, target = label_of(method), run.get("target") or {}
    told = [tag("span", label, class_="name"), tag("span", f"seed {run['seed']}", class_="badge")]
    if name:
        told.append(tag("span", name, class_="badge"))
    if run.get("varied"):
        told.append(tag("span", f"{tables.varied(run['varied'])}, not chosen", class_="badge"))
    if target.get("score") is not None:
        told.append(tag("span", f"target {target['score']:.1f}", class_="number"))
    for shots, entry in (run.get("icl") or {}).items():
        if entry.get("norm_avg") is not None:
            told.append(tag("span", f"{shots}-shot {entry['norm_avg']:.1f}", class_="number"))
    chart = figures.of_run(run)
    settings = {f"steps, {stage}": steps for stage, steps in run["steps"].items()} | (run.get("settings") or {})
    settings |= {key: run.get(key) for key in ("seconds", "model", "base", "commit")}
    settings |= {f"version of {name}": version for name, version in (run.get("versions") or {}).items()}
    lines = [[key, _value(value)] for key, value in settings.items() if value is not None]
    parts = [figure(chart, small=True) if chart else None, _scores(run), _curve(run)]
    parts.append(tag("details", tag("summary", "Settings"), grid(lines, ["setting", "value"], f"Settings of {label}")))
    body = tag("details", tag("summary", Markup(" ".join(told))), *parts)
    return tag("article", body, class_="item", data_tuned_on=name, data_method=label, data_seed=run["seed"])


def _scores(run: Json) -> Markup:
    rows = []
    for shots, entry in (run.get("icl") or {}).items():
        for task, scored in (entry.get("tasks") or {}).items():
            interval = " to ".join(_value(end) for end in scored.get("ci95") or ())
            share = _value(scored.get("format_share"))
            rows.append([f"{task}, {shots}-shot", scored["metric"], _value(scored.get("score")), interval, share])
    head = ["task", "metric", "score", "95 % interval", "format share (%)"]
    return tag("details", tag("summary", "Scores"), grid(rows, head, "Scores of the test split"))


def _curve(run: Json) -> Markup:
    keys = ("stage", "step", "loss", "target", "icl", "format_share")
    points = [point | {"step": tables.place(point["step"], point.get("alpha"))} for point in run["curve"]]
    rows = [[_value(point.get(key)).removeprefix("step ") for key in keys] for point in points]
    return tag("details", tag("summary", "Checkpoints"), grid(rows, keys, "Scores of the validation split"))


def _value(value: Any) -> str:
    if value is None:
        return tables.ABSENT
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _select(name: str, values: Iterable[str]) -> Markup | None:
    """A choice among the values, where there is one."""
    options = list(dict.fromkeys(values))
    if len(options) < 2:
        return None
    chosen = [tag("option", "all", value="*"), *(tag("option", value, value=value) for value in options)]
    return tag("label", f"{name} ", tag("select", *chosen, name=name.replace(" ", "-")))


def _browser(controls: Iterable[Markup | None], items: Iterable[Markup]) -> Markup:
    """Items behind a search form, which a script brings to life."""
    search = tag("label", "search ", tag("input", type="search", name="search", placeholder="any words"))
    count = tag("output", "", class_="count")
    form = tag("form", search, *controls, count, class_="filter", hidden=True)
    more = tag("button", "Show more", type="button", class_="more", hidden=True)
    return tag("div", form, tag("div", *items, class_="items"), more, class_="browser", data_per_page=PER_PAGE)
