"""Rewrites the tables of docs/performance.md from `docs/findings/bench/*.json`, between markers; prose outside stays.

A table stands between `<!-- bench: NAME -->` and `<!-- end -->`. NAME is a question's; `goals` are all ratios beside
their goals, `machine` is what the benchmarks ran on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import QUESTIONS, figures
from benchmarks.harness import ROOT
from promot_jax import files
from promot_jax.report import svg
from promot_jax.report.markdown import markdown

PAGE = ROOT / "docs" / "performance.md"
KEPT = ROOT / "docs" / "findings" / "bench"  # committed, so that a run of one question leaves the tables of the others
FIGURES = ROOT / "docs" / "figures"
# By key of a ratio: what it is against, and the goal, which the value should not exceed (speed-ups: reach); 0 for none.
GOALS: dict[str, tuple[str, float]] = {
    "stage1_time_vs_peft_f32": ("peft prompt tuning, float32", 0.6),
    "stage1_memory_vs_peft_f32": ("peft prompt tuning, float32", 0.6),
    "stage2_time_vs_transformers_f32": ("full tuning with transformers, float32", 0.65),
    "stage2_memory_vs_transformers_f32": ("full tuning with transformers, float32", 0.9),
    "stage1_time_vs_products_f32": ("the step's matrix products alone, by XLA", 0.0),
    "stage1_products_time_vs_peft_f32": ("those products alone, against peft", 0.0),
    "stage2_time_vs_products_f32": ("the step's matrix products alone, by XLA", 0.0),
    "stage2_products_time_vs_transformers_f32": ("those products alone, against transformers", 0.0),
    "icl_eval_vs_lm_eval": ("lm-eval, same prompts", 0.5),
    "icl_eval_vs_lm_eval_per_task": ("lm-eval, same prompts, exemplars drawn per task", 0.25),
    "greedy_vs_generate": ("transformers.generate", 0.5),
    "beam_vs_generate": ("transformers.generate, 4 beams", 0.5),
    "batch_packing_speedup_movie_sentiment": ("this package without packing", 1.5),
    "batch_packing_speedup_rte_like": ("this package without packing", 1.5),
    "batch_packing_speedup_qa_like": ("this package without packing", 1.5),
    "first_step_warm_s": ("seconds from launch, warm cache", 15.0),
}
_BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NOT_RUN = "Not measured yet: `make bench` writes this table.\n"


def keep(answer: Mapping[str, Any], folder: Path = KEPT) -> None:
    """Writes the answer to a question into a folder, with the ratios of the run that lay there before (`before`)."""
    path = folder / f"{answer['question']}.json"
    earlier = json.loads(path.read_text("utf-8")) if path.is_file() else None
    before = {name: earlier[name] for name in ("machine", "ratios")} if earlier else None
    files.write({**answer, "before": before}, path)


def rewrite(page: Path = PAGE, folder: Path = KEPT, drawn: Path = FIGURES) -> None:
    """Rewrites a page from the results in a folder, and the figures of how cost grows; what is missing is said so."""
    answers = {
        name: json.loads(path.read_text("utf-8")) for name in QUESTIONS if (path := folder / f"{name}.json").is_file()
    }

    def block(match: re.Match[str]) -> str:
        return match[1] + _content(match[2], answers) + match[3]

    files.write_text(page, _BLOCK.sub(block, page.read_text("utf-8")))
    for axis, case in answers.get("cost_growth", {"cases": {}})["cases"].items():
        chart = figures.growth(axis, case)
        files.write_text(drawn / f"{chart.name}.svg", svg.document(chart))


def _content(name: str, answers: Mapping[str, Any]) -> str:
    if name == "goals":
        return _goals(answers)
    if name == "machine":
        return _machines(answers)
    return _question(answers[name]) if name in answers else _NOT_RUN


def _goals(answers: Mapping[str, Any]) -> str:
    rows = [["ratio", "against", "median", "range over pairs", "run before", "goal"]]
    for answer in answers.values():
        earlier = _ratios_before(answer)
        for key, value in answer["ratios"].items():
            against, goal = GOALS.get(key, ("", 0.0))
            limit = f"at least {goal:g}" if "speedup" in key else f"at most {goal:g}"
            low, high = answer["ranges"][key]
            before = f"{earlier[key]:.2f}" if key in earlier else ""
            shown = [f"{value:.2f}", f"{low:.2f} to {high:.2f}", before, limit if goal else ""]
            rows.append([f"`{key}`", against, *shown])
    return markdown(rows) + "\n" if len(rows) > 1 else _NOT_RUN


def _ratios_before(answer: Mapping[str, Any]) -> Mapping[str, float]:
    """The ratios of the run before on the same kind of machine, none if that was on another one."""
    before = answer["before"]
    alike = before and all(before["machine"][key] == answer["machine"][key] for key in ("cpu", "flags", "cores"))
    return before["ratios"] if alike else {}


def _machines(answers: Mapping[str, Any]) -> str:
    """One line for each machine with its versions, and the questions that were answered there."""
    places: dict[str, list[str]] = {}
    for name, answer in answers.items():
        machine = answer["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
        where = f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags']) or 'no AVX2'}), "
        where += f"{machine['memory_bytes'] / 2**30:.0f} GiB; {versions}"
        when = f"{machine['date']}, commit {(machine['commit'] or 'unknown')[:12]}"
        places.setdefault(where, []).append(f"{name} ({when}, {answer['pairs']} pairs, load {machine['load']:.1f})")
    return "".join(f"- {where}: {', '.join(names)}.\n" for where, names in places.items()) or _NOT_RUN


def _question(answer: Mapping[str, Any]) -> str:
    columns = answer["columns"]
    rows = [["", "", *(column["title"] for column in columns.values())]]
    for case, result in answer["cases"].items():
        for number, (side, measures) in enumerate(result["sides"].items()):
            chosen = result["variants"].get(side, {}).get("chosen", "")
            name = f"{side} ({chosen})" if chosen else side
            cells = [_cell(measures.get(key), column["scale"]) for key, column in columns.items()]
            rows.append([case if number == 0 else "", name, *cells])
    return markdown(_filled(rows)) + "\n"


def _cell(statistics: Mapping[str, float] | None, scale: float) -> str:
    """`1.20 [1.18, 1.25]`: the median and the range, "" for a measure that a side does not have."""
    if statistics is None:
        return ""
    median, low, high = (f"{scale * statistics[name]:.3g}" for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]" if low != high else median


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows without columns that are empty below their title."""
    kept = [index for index in range(len(rows[0])) if index < 2 or any(row[index] for row in rows[1:])]
    return [[row[index] for index in kept] for row in rows]
