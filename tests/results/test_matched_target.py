"""Checkpoints at matched target score."""

from hypothesis import given
from hypothesis import strategies as st

from promot_jax.report import tables
from promot_jax.results import paired, spread
from promot_jax.results.comparison import comparison
from promot_jax.results.example_scores import ExampleScores
from promot_jax.results.matched_target import Match, matched
from promot_jax.results.records import replace
from promot_jax.results.schema import Comparison, Run
from promot_jax.results.scores import Icl, Score, StepEvaluation, Target, Tested


def points(*targets, stage="finetune", first=0):
    """A curve with a point every 10 steps; ICL falls by one a point."""
    return [
        StepEvaluation(step=10 * index, stage=stage, target=target, icl=50.0 - index, format_share=float(index))
        for index, target in enumerate(targets, start=first)
    ]


def test_lowest_of_the_best_scores_is_the_threshold_and_the_first_to_reach_it_counts():
    curves = {
        "finetune": [points(3, 60, 92, 95, 90)],
        "promot": [points(80, 85, 88, 91, 87, stage="stage2")],
    }
    found = matched(curves)
    assert found["finetune"] == [Match(threshold=91, step=20, target=92, icl=48.0, format_share=2.0)]
    assert found["promot"] == [Match(threshold=91, step=30, target=91, icl=47.0, format_share=3.0)]


def test_step_0_is_not_a_model_that_was_tuned():
    curves = {"finetune": [points(3, 60, 90)], "promot": [points(99, 91, 92, stage="stage2")]}
    assert matched(curves)["promot"][0].step == 10


def test_stage_1_takes_no_part():
    stage1 = points(0, 99, stage="stage1")
    found = matched({"promot": [stage1 + points(50, 60, stage="stage2")], "prompt_tuning": [stage1]})
    assert list(found) == ["promot"]
    assert found["promot"][0].threshold == 60


def test_seeds_are_matched_one_by_one_and_only_where_all_methods_have_them():
    curves = {
        "a": [points(0, 90), points(0, 70), points(0, 80)],
        "b": [points(0, 60), [], points(0, 85)],
        "pretrained": [[]],
    }
    found = matched(curves)
    assert list(found) == ["a", "b"]
    assert [match and match.threshold for match in found["a"]] == [60, None, 80]
    assert [match and match.threshold for match in found["b"]] == [60, None, 80]


def test_missing_seeds_and_unscored_points():
    unscored = [StepEvaluation(step=step, stage="finetune", target=target) for step, target in ((10, None), (20, 50.0))]
    found = matched({"a": [unscored, points(0, 10)], "b": [points(0, 60), []]})
    assert found["a"] == [Match(50.0, 20, 50.0, None, None), None]
    assert found["b"][1] is None
    assert matched({}) == {}
    assert matched({"pretrained": [[]]}) == {}


scores = st.lists(st.floats(0, 100), min_size=2, max_size=8)


@given(st.dictionaries(st.sampled_from("abcd"), scores, min_size=1))
def test_every_method_reaches_the_threshold_and_no_earlier_checkpoint_does(curves):
    found = matched({method: [points(*targets)] for method, targets in curves.items()})
    for method, (match,) in found.items():
        tuned = curves[method][1:]
        assert match.threshold == min(max(targets[1:]) for targets in curves.values())
        assert match.target >= match.threshold
        assert all(target < match.threshold for target in tuned[: match.step // 10 - 1])


def on_test(score: float) -> Tested:
    tasks = {"a": Score(metric="m", score=score / 2, n=1)}
    return Tested(target=Target(task="t_1shot", metric="m", score=score, n=1), icl={"1": Icl.of(tasks)})


def runs(*tests: dict[int, float]) -> Comparison:
    """A run of fine-tuning, which is matched at step 20, and one of ProMoT, at 10; with test scores at some steps."""
    curves = (points(3, 60, 94, 95), points(80, 93, 92, stage="stage2"))
    made = []
    for method, curve, known in zip(("finetune", "promot"), curves, tests, strict=True):
        tasks = {"a": Score(metric="m", score=1.0, n=1)}
        scored = [replace(p, tasks=tasks, test=on_test(known[p.step]) if p.step in known else None) for p in curve]
        target = Target(task="t", metric="m", score=77.0, n=1, shots=1)
        best = {"finetune": {"finetune": 30}, "promot": {"stage2": 10}}[method]
        fields = {"steps": {}, "icl": {}, "settings": {"curve_shots": 1}, "best_step": best}
        made.append(Run(method=method, seed=0, target=target, curve=scored, **fields))
    return comparison([*made, Run(method="pretrained", seed=0, steps={}, target=None, icl={}, curve=[])])


def test_checkpoints_at_matched_target_score_have_their_scores_of_the_test_split() -> None:
    found = runs({20: 88.0, 30: 99.0}, {10: 90.0})
    scores = {run.method: run.matched_test for run in found.runs}
    assert {name: one.target and one.target.score for name, one in scores.items() if one} == {
        "finetune": 88.0, "promot": 90.0, "pretrained": None
    }  # fmt: skip
    one = scores["finetune"]
    assert one and one.target and (one.target.task, one.target.shots, one.icl["1"].norm_avg) == ("t", 1, 44.0)


def test_a_best_checkpoint_at_matched_target_score_has_those_of_the_final_evaluation() -> None:
    found = runs({20: 88.0}, {})
    promot = found.methods["promot"][0].matched_test
    assert promot and promot.target and promot.target.score == 77.0


def test_where_one_method_has_no_test_score_at_matched_target_score_none_has() -> None:
    """The best checkpoint of fine-tuning is another one."""
    assert {run.method: run.matched_test for run in runs({}, {10: 90.0}).runs} == dict.fromkeys(
        ("finetune", "promot", "pretrained")
    )


def test_tables_and_paired_differences_at_matched_target_score_on_the_test_split() -> None:
    found = runs({20: 88.0}, {10: 90.0})
    matched = tables.at_matched_score(found)
    assert list(matched) == ["validation split", "test split"]
    (row,) = [row for row in matched["test split"].rows if row.summary and "target" in row.label]
    assert {method: cell.value for (method, _), cell in row.cells.items()} == {"finetune": 88.0, "promot": 90.0}
    assert spread.of_comparison(found, "matched_test")["promot"]["target"].mean == 90.0

    def with_examples(run: Run) -> Run:
        digits = {"finetune": "1100", "promot": "1110", "pretrained": "0000"}[run.method]
        scores = ExampleScores(metric="m", examples="", prompts="", scores=digits)
        evaluated = {"target": {"t": scores}}
        return replace(run, matched_test=run.matched_test and replace(run.matched_test, example_scores=evaluated))

    methods = {name: [*map(with_examples, of)] for name, of in found.methods.items()}
    (difference, *_) = paired.differences(Comparison(methods=methods), "matched_test")
    assert (difference.first, difference.second, difference.score) == ("promot", "finetune", "target")
    assert difference.mean == 25 and not paired.differences(found)
