"""Scores of single examples, collected from outputs."""

from typing import Any

import pytest

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio

from promot_jax.data.examples import Example
from promot_jax.data.task_functions import judge
from promot_jax.errors import UserError
from promot_jax.evaluation import example_scores
from promot_jax.results import records
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.scores import Icl, Output, Score, Target


def output(task: str, number: int, score: float | None = None, **changes: Any) -> Output:
    fields = {"input": f"query {number}", "target": "", "output": "", "raw": "", "dropped_shots": 0}
    return Output(task=task, id=str(number), score=score, **fields | changes)


def icl(**metrics: str) -> Icl:
    return Icl.of({task: Score(metric=metric, score=1.0, n=1) for task, metric in metrics.items()})


@pytest.mark.parametrize("target", ["True", " True"])
@pytest.mark.parametrize("output", ["True", " True"])
def test_the_space_that_joins_a_target_to_its_input_is_not_scored(target: str, output: str) -> None:
    """Of a SeqIO task without a post-processor, whose targets and outputs stay as they are in SeqIO."""
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("test",))
    task = seqio.Task("bare", source, output_features={}, preprocessors=[])
    judgement = judge(task, Example("bare", "1", "answer:", target, (), "", 0), output)
    assert judgement.target == judgement.output == "True"


def test_right_and_wrong_become_digits_and_other_scores_numbers() -> None:
    rows = [output("a", number, score) for number, score in enumerate((0.0, 100.0, 100.0))]
    rows += [output("b", number, score) for number, score in enumerate((0.0, 200 / 3))]
    found = example_scores.of_icl(4, icl(a="accuracy", b="token_f1"), rows)["icl_4shot"]
    assert (found["a"].metric, found["a"].scores) == ("accuracy", "011")
    assert (found["b"].metric, found["b"].scores) == ("token_f1", [0.0, 66.667])
    a, b = (found[task].values() for task in "ab")
    assert a is not None and a.tolist() == [0, 100, 100] and b is not None and b.tolist() == [0, 66.667]
    assert (found["a"].size, found["b"].size) == (3, 2)


def test_a_corpus_metric_leaves_statistics_and_one_of_neither_kind_nothing() -> None:
    rows = [output("a", 0, statistics=[1, 2]), output("a", 1, statistics=[3, 4.5]), output("b", 0)]
    found = example_scores.of_icl(1, icl(a="bleu", b="odd"), rows)
    assert list(found["icl_1shot"]) == ["a"]
    scores = found["icl_1shot"]["a"]
    assert (scores.statistics, scores.scores, scores.size, scores.values()) == ([[1, 2], [3, 4.5]], "", 2, None)


def test_draws_of_exemplars_are_apart_and_digests_tell_examples_and_prompts() -> None:
    rows = [output("a", n, 100.0, draw=draw, input=f"{draw} {n}") for draw in (0, 1) for n in (5, 6)]
    found = example_scores.of_icl(1, icl(a="accuracy"), rows)
    assert list(found) == ["icl_1shot", "icl_1shot/draw_1"]
    first, second = (found[name]["a"] for name in found)
    assert first.examples == second.examples and first.prompts != second.prompts
    swapped = example_scores.of_icl(1, icl(a="accuracy"), rows[1::-1])["icl_1shot"]["a"]
    assert swapped.examples != first.examples


def test_tasks_of_a_mixture_that_was_trained_on_have_their_own_metrics() -> None:
    rows = [output("a", 0, 100.0), output("b", 0, 0.0)]
    tasks = {name: Score(metric=metric, n=1) for name, metric in (("a", "accuracy"), ("b", "exact_match"))}
    mixture = Target(task="a_and_b", metric="norm_avg", n=2, tasks=tasks)
    found = example_scores.of_target(mixture, rows)["target"]
    assert {name: scores.metric for name, scores in found.items()} == {"a": "accuracy", "b": "exact_match"}
    alone = example_scores.of_target(Target(task="a_1shot", metric="accuracy", n=1), rows[:1])["target"]
    assert alone == {"a": found["a"]}


@pytest.mark.parametrize("values", [{"scores": "012"}, {}, {"scores": "1", "statistics": [[1]]}, {"scores": [101.0]}])
def test_what_are_no_scores_is_refused(values: dict[str, Any]) -> None:
    document = {"metric": "m", "examples": "", "prompts": "", **values}
    with pytest.raises(UserError, match="is not in its layout"):
        records.parse(document, ExampleScores, "'scores'")
