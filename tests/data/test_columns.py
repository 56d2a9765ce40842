"""From columns to inputs and targets; the reference of a template is `str.format`."""

from typing import Any

import pytest

from promot_jax.data import columns
from promot_jax.data.files import DataFile, DataSet, Record
from promot_jax.errors import UserError


def data(*rows: dict[str, Any]) -> DataSet:
    return DataSet("mine.jsonl", {"train": [Record(f"mine.jsonl line {i}", row) for i, row in enumerate(rows, 1)]})


def pairs(settings: DataFile, *rows: dict[str, Any]) -> list[tuple[str, str]]:
    found = data(*rows)
    return [pair[1:] for pair in columns.filled(list(found.records), columns.of(settings, found))]


@pytest.mark.parametrize(
    ("row", "inputs", "targets"),
    [
        ({"completion": "b", "prompt": "a"}, "a", "b"),
        ({"Input": "a", "Target": "b", "id": "1"}, "a", "b"),
        ({"inputs": "a", "targets": 2}, "a", "2"),
        ({"text": "a", "label": "b"}, "Text: a\nLabel:", "b"),
        ({"question": "a?", "answer": "b"}, "Question: a?\nAnswer:", "b"),
        ({"instruction": "do", "input": "a", "output": "b"}, "do\na\n", "b"),
        ({"instruction": "do", "input": "", "output": "b"}, "do\n", "b"),
        ({"instruction": "do", "output": "b"}, "do\n", "b"),
    ],
)
def test_columns_of_known_names(row: dict[str, Any], inputs: str, targets: str) -> None:
    assert pairs(DataFile("mine.jsonl"), row) == [(inputs, targets)]


def test_a_line_break_as_a_shell_writes_it() -> None:
    assert pairs(DataFile("mine.jsonl", r"{text}\nLabel:", "{label}"), {"text": "a", "label": "b"}) == [
        ("a\nLabel:", "b")
    ]


def test_templates_of_the_user() -> None:
    settings = DataFile("mine.jsonl", "{The text} {{in braces}}\nGood? {text}", "{label}.")
    row = {"The text": "{text} {0.__class__}", "text": "a", "label": "b"}
    expected = settings.inputs.format(**row), settings.targets.format(**row)
    assert pairs(settings, row) == [expected]


@pytest.mark.parametrize(
    ("inputs", "targets", "says"),
    [
        ("{text}", "", "TARGET_TEMPLATE is missing"),
        ("", "{label}", "INPUT_TEMPLATE is missing"),
        (
            "{txt}",
            "{label}",
            r"INPUT_TEMPLATE names \{txt\}, which is no column of mine.jsonl \(did you mean 'text'\?\)",
        ),
        ("{text", "{label}", "INPUT_TEMPLATE is no template"),
        ("{}", "{label}", "a field without a name"),
        ("{text!r}", "{label}", "with a format"),
        ("{text.__class__}", "{label}", "names {text.__class__}, which is no column"),
        ("{text}", "good", "TARGET_TEMPLATE names no column"),
    ],
)
def test_templates_that_cannot_be(inputs: str, targets: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        pairs(DataFile("mine.jsonl", inputs, targets), {"text": "a", "label": "b"})


def test_columns_of_unknown_names() -> None:
    with pytest.raises(UserError, match=r"The columns of mine.jsonl are review, stars.*--gin.INPUT_TEMPLATE="):
        pairs(DataFile("mine.jsonl"), {"review": "a", "stars": 5})


@pytest.mark.parametrize("empty", ["", " ", None, float("nan")])
def test_rows_without_text_are_named_by_their_lines(empty: Any) -> None:
    sound = {"text": "a", "label": "b"}
    with pytest.raises(UserError, match=r"no text in column 'label' of mine.jsonl line 2, mine.jsonl line 4; fill"):
        pairs(DataFile("mine.jsonl"), sound, sound | {"label": empty}, sound, sound | {"label": empty})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a"], "line 1, column 'text', has a list, which is no text"),
        ("\ud83d", "line 1, column 'text', has half a char"),
    ],
)
def test_values_that_are_no_text(value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        pairs(DataFile("mine.jsonl"), {"text": value, "label": "b"})
