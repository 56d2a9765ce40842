"""Results drawn at random, as records. No number here was measured."""

import random

from hypothesis import strategies as st

from promot_jax import files
from promot_jax.results import records
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.schema import Alignment, Comparison, GradientAlignment, Run
from promot_jax.results.scores import Icl, Score, StepEvaluation, Target

TASKS = {"capital": "exact_match", "past_tense": "exact_match", "negation": "rouge2", "reading_qa": "token_f1"}
# The figures of a report of these results, in order; what analyses add comes after them.
FIGURES = [
    "frontier",
    "tradeoff",
    "tradeoff_metrics",
    "forgetting",
    "icl",
    "format_share",
    "format_share_tasks",
    "target",
]
STEPS = {"pretrained": {}, "finetune": {"finetune": 60}, "promot": {"stage1": 60, "stage2": 60}}


def random_run(method, seed):
    """A run of random scores and curves."""
    draw = random.Random(f"{method} {seed}")

    def score():
        middle = draw.uniform(10, 90)
        return {"score": middle, "ci95": (middle - 9, middle + 9), "n": 50}

    def icl():
        scores = {n: Score(metric=metric, format_share=draw.uniform(0, 40), **score()) for n, metric in TASKS.items()}
        return Icl.of(scores, ci95=(30.0, 50.0))

    steps = STEPS.get(method, {"finetune": 60})
    target, averages = Target(task="sentiment", metric="accuracy", **score()), {shots: icl() for shots in ("1", "4")}
    examples = {"target": {"sentiment": random_examples(draw, target.score)}}
    for shots, average in averages.items():
        scores = {name: random_examples(draw, task.score) for name, task in average.tasks.items()}
        examples[f"icl_{shots}shot"] = scores
    return Run(
        method=method,
        seed=seed,
        steps=dict(steps),
        seconds=draw.uniform(10, 400),
        target=target,
        icl=averages,
        example_scores=examples,
        curve=[point for stage in steps for point in random_curve(stage, draw)],
        versions={"python": "3.11.9", "jax": "0.10.2", "promot_jax": None},
        commit="0123456789abcdef-dirty",
        model="random_weights",
        settings={"learning_rate": 1e-4, "curve_shots": 1},
    )


def random_examples(draw, score):
    """Scores of 50 examples with about this mean."""
    digits = "".join("1" if draw.uniform(0, 100) < score else "0" for _ in range(50))
    return ExampleScores(metric="m", examples="", prompts="", scores=digits)


def random_curve(stage, draw):
    """Target scores that rise, ICL that falls."""
    target, icl, share, points = draw.uniform(0, 10), draw.uniform(48, 55), 0.0, []
    for step in range(0, 61, 10):
        scores = {"step": step, "stage": stage, "loss": draw.random(), "target": target}
        if stage != "stage1":
            shares = {name: {"score": draw.uniform(0, 90), "format_share": draw.uniform(0, 40)} for name in TASKS}
            tasks = {name: Score(metric=TASKS[name], n=50, **shares[name]) for name in TASKS}
            scores |= {"icl": icl, "format_share": share, "tasks": tasks}
            examples = {name: random_examples(draw, task.score) for name, task in tasks.items()}
            scores["example_scores"] = {
                "target": {"sentiment": random_examples(draw, target)},
                "icl_1shot": examples,
            }
        points.append(StepEvaluation(**scores))
        target, icl, share = (
            min(95, target + draw.uniform(0, 30)),
            icl * draw.uniform(0.7, 1),
            share + draw.random() * 15,
        )
    return points


def random_results(seeds=2, methods=("pretrained", "finetune", "promot")):
    """Random runs of several methods and seeds."""
    return Comparison(methods={method: [random_run(method, seed) for seed in range(seeds)] for method in methods})


def random_document(*args, **kwargs):
    """`random_results` as plain JSON, which a test may change."""
    return files.plain(random_results(*args, **kwargs))


def made(data):
    """A comparison of plain JSON."""
    return records.parse(data, Comparison, "the test's results")


def read_comparison(folder):
    """The `results.json` of a comparison's folder."""
    return records.read(folder / "results.json", Comparison)


def prune(data, draw):
    """Drops parts of results at random, as kills, failures and open tasks would."""
    for method in list(data["methods"]):
        if draw.random() < 0.3:
            del data["methods"][method]
            continue
        data["methods"][method] = [run for run in data["methods"][method] if draw.random() < 0.7]
        for run in data["methods"][method]:
            if draw.random() < 0.3:
                run["target"] = None
            elif draw.random() < 0.3:
                run["target"] |= {"score": None, "ci95": None}
            run["icl"] = {shots: entry for shots, entry in run["icl"].items() if draw.random() < 0.7}
            for entry in run["icl"].values():
                entry["tasks"] = {name: task for name, task in entry["tasks"].items() if draw.random() < 0.7}
                for task in entry["tasks"].values():
                    task |= {key: None for key in ("score", "ci95", "format_share") if draw.random() < 0.2}
                entry |= {key: None for key in ("norm_avg", "format_share") if draw.random() < 0.2}
            run["curve"] = [point for point in run["curve"] if draw.random() < 0.7]
            for point in run["curve"]:
                point |= {key: None for key in ("loss", "target", "icl", "format_share") if draw.random() < 0.2}
            for key in ("seconds", "versions", "commit", "model", "settings"):
                if draw.random() < 0.3:
                    run.pop(key, None)


# Text that a page or a Markdown file must show as it is.
MARKUP = [
    *(
        "|",
        "\\|",
        "\\",
        "`",
        "``",
        "```",
        "| a | b |",
        "---",
        "\n",
        "\r\n",
        "\n\n",
        "\t",
        "    a",
        "# a",
        "> a",
        "1. a",
        "- a",
    ),
    *(
        "<b>",
        "</code>",
        "<!--",
        "-->",
        "<a@b.org>",
        "&lt;",
        "&#60;",
        "![x](y)",
        "[x](y)",
        "[x]: y",
        "$$",
        ":-)",
        "~~a~~",
    ),
    *("*a*", "**", "__a__", "_a_", "https://a.b", "www.a.b", "WWW.a.b", "a@b.org", "mailto:a@b.org"),
    *("\x00", "\u2028", "\u202e", "\ud800"),
]
NASTY = st.lists(st.text(max_size=8) | st.sampled_from(MARKUP), max_size=8).map("".join)


def alignment(**changes):
    """What the job `gradient_alignment` leaves."""
    scopes = [(scope, group) for scope in ("last decoder layer", "all layers") for group in ("MLP", "query")]
    points = [
        Alignment(step=step, prompt=prompt, scope=scope, group=group, mean=0.9, low=0.8, high=1.0, std=0.1, n=4)
        for step in (0, 20)
        for prompt in ("sentiment", "")
        for scope, group in scopes
    ]
    fields = {"stage": "stage2", "task": "sentiment", "seed": 0, "changed": 0.5, "batches": 4, "points": points}
    return GradientAlignment(job="gradient_alignment", **fields | changes)
