"""The demo's tasks. The tests marked `real` read the data themselves."""

import collections
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import seqio

from promot_jax.data import examples as text
from promot_jax.data.exemplars import choose, compose

text.import_tasks(["promot_jax.tasks.demo"])
SPLITS = ("train", "validation", "test")
# Metric, label set, rows of train / validation / test. Small sources: countries, and sentences made into questions.
TASKS = {
    "capital": ("exact_match", 0, (38, 20, 100)),
    "continent": ("accuracy", 6, (38, 20, 100)),
    "nationality": ("exact_match", 0, (38, 20, 100)),
    "past_tense": ("exact_match", 0, (95, 20, 100)),
    "plural": ("exact_match", 0, (96, 20, 100)),
    "product_sentiment": ("accuracy", 2, (406, 50, 100)),
    "country_reading": ("token_f1", 0, (38, 20, 100)),
    "negation": ("exact_match", 0, (154, 30, 100)),
    "question": ("rouge2", 0, (30, 20, 100)),
    "editing": ("bleu", 0, (870, 50, 100)),
}
ALL = TASKS | {
    "movie_sentiment": ("accuracy", 2, (4668, 500, 500)),
    "interface_enfr": ("bleu", 0, (1542, 100, 200)),
}


def test_the_battery() -> None:
    assert text.task_names("demo_icl") == list(TASKS)
    assert text.task_names("demo_icl_4shot") == [f"{name}_4shot" for name in TASKS]
    assert {f"movie_sentiment_{k}shot" for k in (1, 4)} <= set(seqio.TaskRegistry.names())


@pytest.mark.parametrize("name", ALL)
def test_the_first_metric(name: str) -> None:
    assert next(iter(text.get(name).metric_fns[0](["a"], ["a"]))) == ALL[name][0]


def test_the_packages_tasks_are_known_and_downloads_nothing(tmp_path: Path) -> None:
    """Though nobody names their modules: a user's own task is evaluated beside the demo's ICL tasks."""
    script = "from promot_jax.data import examples as e; e.get('demo_icl_2shot'); e.get('rte_1shot')"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PROMOT_ASSETS": str(tmp_path / "assets"), "PATH": ""}

    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)

    assert not (tmp_path / "assets").exists()


@pytest.mark.real
@pytest.mark.parametrize("name", ALL)
def test_splits(name: str) -> None:
    _, labels, sizes = ALL[name]
    read = {split: text.read(name, split) for split in SPLITS}

    assert tuple(len(read[split]) for split in SPLITS) == sizes
    examples = [example for part in read.values() for example in part]
    assert len({e.id for e in examples}) == len(examples)
    assert len({e.inputs.lower() for e in examples}) == len(examples)
    for example in examples:
        assert example.inputs == example.inputs.strip()
        assert example.targets == example.targets.strip() != ""
        assert len(example.inputs.split()) <= 25 + len(example.prefix.split()) + 15
        assert len(example.labels) == labels
        assert not labels or example.targets in example.labels
        assert example.inputs.startswith(example.prefix) or name == "country_reading"


@pytest.mark.real
@pytest.mark.parametrize("name", ["movie_sentiment", "product_sentiment"])
@pytest.mark.parametrize("split", SPLITS)
def test_sentiment_is_balanced(name: str, split: str) -> None:
    counts = collections.Counter(example.targets for example in text.read(name, split))

    assert len(counts) == 2
    assert len(set(counts.values())) == 1


@pytest.mark.real
def test_the_target_task_is_asked_like_rte() -> None:
    for example in text.read("movie_sentiment", "test", limit=20):
        assert example.inputs.endswith(" question: Is this review positive? Is it true or false? answer:")
        assert example.labels == ("True", "False")


@pytest.mark.real
def test_a_country_falls_into_the_same_split_of_every_task() -> None:
    test = {name: {e.id for e in text.read(name, "test")} for name in ("capital", "continent", "country_reading")}

    assert test["capital"] == test["continent"] == test["country_reading"]


@pytest.mark.real
def test_postprocessed_targets_score_100() -> None:
    for name in ALL:
        task, examples = text.get(name), text.read(name, "test")
        targets = [task.postprocess_fn(e.targets, example={}, is_target=True) for e in examples]
        answers = [task.postprocess_fn(f" {e.targets}\n\nmore", example={}, is_target=False) for e in examples]

        for metric in task.metric_fns:
            assert list(metric(targets, answers).values()) == [pytest.approx(100.0)], name


@pytest.mark.real
def test_prompts_are_the_same_everywhere() -> None:
    """One hash over every 4-shot prompt: another machine, release or row order must not change it unnoticed."""
    digest = hashlib.sha256()
    for name in TASKS:
        pool = text.read(name, "train")
        for example in text.read(f"{name}_4shot", "test"):
            chosen = choose(name, 0, example.id, pool, example.shots, example.inputs)
            digest.update(compose(example, chosen, len, 10_000)[0].encode())

    assert digest.hexdigest()[:16] == "db1cb053d0dfc74f"
