"""The page: tables between markers are rewritten, prose stays; figures of growth say what was measured and expected."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import QUESTIONS, figures, performance

PAGE = """\
# Performance

Prose before.

<!-- bench: goals -->
old
<!-- end -->

Prose between.

<!-- bench: step_stage1 -->
old
<!-- end -->
<!-- bench: machine -->
<!-- end -->
<!-- bench: loading -->
<!-- end -->
"""
MACHINE = {
    "cpu": "AMD EPYC", "flags": ["avx2"], "cores": 2, "memory_bytes": 8 * 2**30, "load": 0.12,
    "commit": "0123456789abcdef", "date": "2026-11-29", "versions": {"jax": "0.10.2", "torch": None},
}  # fmt: skip


def statistics(*values: float) -> dict[str, Any]:
    return {"median": sorted(values)[len(values) // 2], "low": min(values), "high": max(values), "values": list(values)}


def answer() -> dict[str, Any]:
    sides = {
        "ours_f32": {"seconds": statistics(6.0, 6.5, 7.0), "peak_bytes": statistics(3.7e9)},
        "peft_f32": {"seconds": statistics(10.0), "peak_bytes": statistics(3.5e9)},
    }
    key = "stage1_time_vs_peft_f32"
    return {
        "question": "step_stage1",
        "machine": MACHINE,
        "pairs": 3,
        "columns": {
            "seconds": {"title": "seconds", "scale": 1.0},
            "peak_bytes": {"title": "peak, GB", "scale": 1e-9},
            "growth_bytes": {"title": "growth, GB", "scale": 1e-9},
        },
        "ratios": {key: 0.65, "other": 1.0},
        "ranges": {key: [0.6, 0.7], "other": [1.0, 1.0]},
        "before": None,
        "cases": {"stage 1": {"sides": sides, "variants": {"peft_f32": {"chosen": "torch.compile", "race": {}}}}},
    }


def test_keep_names_the_run_before(tmp_path: Path) -> None:
    first, second = answer(), answer() | {"ratios": {"stage1_time_vs_peft_f32": 0.63, "other": 1.0}}
    performance.keep(first, tmp_path)
    performance.keep(second, tmp_path)
    kept = json.loads((tmp_path / "step_stage1.json").read_text("utf-8"))
    assert kept == second | {"before": {"machine": MACHINE, "ratios": first["ratios"]}}
    assert "| 0.63 | 0.60 to 0.70 | 0.65 " in performance._goals({"step_stage1": kept})
    kept["before"]["machine"] = {**MACHINE, "flags": ["avx2", "avx512f"]}
    assert "| 0.63 | 0.60 to 0.70 |  " in performance._goals({"step_stage1": kept})  # of another machine


def test_rewrite(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE, "utf-8")
    (tmp_path / "step_stage1.json").write_text(json.dumps(answer()), "utf-8")
    performance.rewrite(page, tmp_path, tmp_path / "figures")
    text = page.read_text("utf-8")
    assert "Prose before." in text and "Prose between." in text and "old" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| stage 1 | ours_f32 | 6.5 [6, 7] | 3.7 |" in lines
    assert "| | peft_f32 (torch.compile) | 10 | 3.5 |" in lines
    assert "growth" not in text  # no side has that measure
    assert "| `stage1_time_vs_peft_f32` | peft prompt tuning, float32 | 0.65 | 0.60 to 0.70 | | at most 0.6 |" in lines
    where, when = "AMD EPYC, 2 cores (avx2), 8 GiB; jax 0.10.2", "2026-11-29, commit 0123456789ab"
    assert f"- {where}: step_stage1 ({when}, 3 pairs, load 0.1)." in lines
    assert performance._NOT_RUN.strip() in lines  # loading
    performance.rewrite(page, tmp_path, tmp_path / "figures")
    assert page.read_text("utf-8") == text


def test_the_page_has_a_table_for_every_question() -> None:
    text = performance.PAGE.read_text("utf-8")
    assert {name for _, name, _ in performance._BLOCK.findall(text)} == {"goals", "machine", *QUESTIONS}


def test_growth(tmp_path: Path) -> None:
    def point(seconds: float, peak: float, flops: float, size: float) -> dict[str, Any]:
        measures = {"seconds": seconds, "peak_bytes": peak, "expected_flops": flops, "expected_bytes": size}
        return {name: statistics(value) for name, value in measures.items()}

    case = {"sides": {"64": point(0.1, 2e9, 1e9, 1e9), "128": point(0.3, 3.5e9, 2e9, 2e9)}}
    chart = figures.growth("input length", case)
    assert chart.name == "cost_input_length"
    assert chart.alt == (
        "From input length 64 to 128 time grows 3.00 times, expected 2.00; memory 1.75 times, expected 1.50."
    )
    (panel,) = chart.panels
    assert [[round(point.y) for point in line.points] for line in panel.lines] == [
        [100, 300], [100, 200], [100, 175], [100, 150]
    ]  # fmt: skip
    page = tmp_path / "performance.md"
    page.write_text("<!-- bench: cost_growth -->\n<!-- end -->\n", "utf-8")
    grown = answer() | {"question": "cost_growth", "cases": {"input length": {**case, "variants": {}}}}
    (tmp_path / "cost_growth.json").write_text(json.dumps(grown), "utf-8")
    performance.rewrite(page, tmp_path, tmp_path / "figures")
    assert "time at 128: 0.3 s" in (tmp_path / "figures" / "cost_input_length.svg").read_text("utf-8")


@pytest.mark.parametrize("goal", performance.GOALS.values())
def test_goals_are_not_negative(goal: tuple[str, float]) -> None:
    assert goal[0] and goal[1] >= 0
