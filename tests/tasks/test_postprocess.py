import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.tasks import metrics, postprocess

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
def test_targets_are_not_cut(fn: postprocess.Postprocess) -> None:
    assert fn("true Q: Q:\n", example={"prefix": "Q:"}, is_target=True) == "true Q: Q:"


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


@pytest.mark.parametrize("target", ["True ", " True", "\tTrue\n", "True"])
@pytest.mark.parametrize("labels", [("True", "False"), (" True", " False")])
def test_white_space_around_a_target_is_not_scored(target: str, labels: tuple[str, ...]) -> None:
    """The right answer, `str.strip` of the target, is what any output that repeats the target becomes."""
    for fn in (postprocess.label(labels), postprocess.text()):
        right = fn(target, example={}, is_target=True)

        assert right == target.strip()
        assert metrics.accuracy([right], [fn(" True\n")]) == {"accuracy": 100.0}


def test_white_space_around_one_of_several_answers() -> None:
    """The official script of TriviaQA takes white space off every answer (`normalize_answer`)."""
    assert postprocess.text()("Paris", example={"answers": [b" Paris ", b"Paname"]}, is_target=True) == [
        "Paris",
        "Paname",
    ]


def test_a_target_in_other_case_is_the_label_that_outputs_become() -> None:
    ignoring, strict = postprocess.label(CONTINENTS), postprocess.label(CONTINENTS, ignore_case=False)

    assert ignoring("north america", is_target=True) == ignoring("north america") == "North America"
    assert strict("asia", is_target=True) == strict("asia") == "asia"
    assert ignoring("Asia, or not", is_target=True) == "Asia, or not"  # no label: the target stays as it is
