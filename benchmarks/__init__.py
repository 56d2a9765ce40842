"""Benchmarks against what people use today: `make bench` runs them and rewrites the tables of docs/performance.md.

One file per question (`QUESTIONS`). Each pairs this package with another program: both run in alternation, each time in
a process of its own, after a warm-up. `runs/bench/<question>.json` holds every value, medians, and `ratios`;
`docs/findings/bench/` keeps the last one of each question, from which the tables are made.

    python -m benchmarks.step_stage1 --pairs 5      one question
    python -m benchmarks step_stage1 icl_eval       several, and the tables of docs/performance.md

`harness` runs pairs, `worker` is a side's process. `ours` and `baselines` hold the timed work of this package and of
PyTorch; `models` and `prompts` hold what both read. The other programs come with `pip install -e ".[bench]"`.
"""

QUESTIONS = (
    "step_stage1",
    "step_stage2",
    "icl_eval",
    "packing",
    "first_step",
    "start_up",
    "loading",
    "generation",
    "cpu_library",
    "cost_growth",
)
