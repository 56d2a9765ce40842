import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.tasks import postprocess

CONTINENTS = ("America", "North America", "Asia")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (" Paris", "Paris"),
        (" Paris \n\nCountry: Spain", "Paris"),
        ("\nParis", ""),
        ("", ""),
        ("Country: France Country: Spain", "Country: France"),
        ("Paris Country: Spain", "Paris Country: Spain"),
        ("a Country: b Country: c Country: d", "a Country: b"),
    ],
)
def test_cut(output: str, answer: str) -> None:
    assert postprocess.cut(output, "Country:") == answer


def test_no_prefix_cuts_at_the_stop_sequence_only() -> None:
    assert postprocess.cut("Q: a Q: b\nQ: c") == "Q: a Q: b"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (" Asia", "Asia"),
        ("asia.", "Asia"),
        ("ASIA, of course", "Asia"),
        (" North America\nCountry:", "North America"),
        ("America", "America"),
        ("Asian", "Asian"),
        ("The answer is Asia", "The answer is Asia"),
        ("", ""),
    ],
)
def test_label(output: str, answer: str) -> None:
    assert postprocess.label(CONTINENTS)(output) == answer


def test_label_to_the_letter() -> None:
    fn = postprocess.label("ABCD", "Q:", ignore_case=False)

    answers = {" A": "A", "B) cold": "B", "a dog": "a dog", "Apples": "Apples", "D Q: x Q: A": "D"}
    assert {output: fn(output) for output in answers} == answers


def test_several_answers() -> None:
    fn = postprocess.text("Q:")

    assert fn("Paris", example={"answers": ("Paris", "Paname")}, is_target=True) == ["Paris", "Paname"]
    assert fn("Paris", example={"answers": [b"Paris"]}, is_target=True) == ["Paris"]
    assert fn("Paris", example={"answers": ()}, is_target=True) == "Paris"
    assert fn("Paname", example={"answers": ("Paris", "Paname")}) == "Paname"


@pytest.mark.parametrize("fn", [postprocess.text("Q:"), postprocess.label(["True"], "Q:")])
def test_targets_stay_as_they_are(fn: postprocess.Postprocess) -> None:
    assert fn("true Q: Q:\n", example={"prefix": "Q:"}, is_target=True) == "true Q: Q:\n"


@given(st.text(alphabet="ab:\n ", max_size=20), st.text(alphabet="ab:", max_size=2))
def test_a_cut_answer_is_one_stripped_line_with_one_prefix_at_most(output: str, prefix: str) -> None:
    answer = postprocess.cut(output, prefix)

    assert postprocess.cut(answer, prefix) == answer
    assert answer == answer.strip()
    assert "\n" not in answer
    assert answer in output
    if prefix:
        assert answer.count(prefix) <= 1


@given(st.sampled_from(CONTINENTS), st.sampled_from(["", " ", "\n", ".", ", Asia", "\nCountry: x"]))
def test_a_label_is_found_whatever_follows(label: str, rest: str) -> None:
    assert postprocess.label(CONTINENTS)(f" {label.lower()}{rest}") == label


@given(st.text(max_size=20))
def test_what_is_no_label_is_left_to_read(output: str) -> None:
    assert postprocess.label(CONTINENTS)(output) in {*CONTINENTS, postprocess.cut(output)}
