"""Format share of outputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.evaluation.format_share import format_share

LABELS = ("True", "False")


@pytest.mark.parametrize("output", ["True", " True", "False\n", "True.", "False. ", "True!", "True ..."])
def test_labels_count(output):
    assert format_share([output], LABELS) == 100.0


@pytest.mark.parametrize(
    "output", ["true", "TRUE", "True story", "Trueish", "", " ", ".", "(True)", "Not True", "Paris"]
)
def test_other_outputs_do_not(output):
    assert format_share([output], LABELS) == 0.0


def test_share_is_in_percent_of_all_outputs():
    assert format_share(["True", "Paris", "False", "Rome"], LABELS) == 50.0


def test_open_task_or_no_outputs_has_none():
    assert format_share(["True"], ()) is None
    assert format_share([], LABELS) is None


def test_labels_with_punctuation_or_of_punctuation():
    assert format_share(["yes!", "yes", "no"], {"yes!"}) == pytest.approx(200 / 3)
    assert format_share(["!", "?", ""], {"!"}) == pytest.approx(100 / 3)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=8), st.sets(st.text(max_size=6), max_size=4))
def test_always_a_percentage(outputs, labels):
    share = format_share(outputs, labels)
    assert share is None if not labels else 0 <= share <= 100


@given(st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_label_counts_as_itself(labels):
    assert format_share(sorted(labels), labels) == 100.0
