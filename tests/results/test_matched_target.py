"""Checkpoints at matched target score."""

from hypothesis import given
from hypothesis import strategies as st

from promot_jax.results.matched_target import Match, matched
from promot_jax.results.scores import StepEvaluation


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
