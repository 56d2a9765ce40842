"""A run's rows, looked at before its model is loaded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from promot_jax.data import examples, validation
from promot_jax.data.rows import RowsSource
from promot_jax.errors import UserError
from promot_jax.tasks import metrics, register, templates

pytestmark = pytest.mark.usefixtures("registry")
TEMPLATE = templates.Template("Review: {text}\nLabel:", "{label}", "Review:")
SPLITS = ("validation", "test")


def rows(split: str) -> list[dict[str, Any]]:
    return [{"id": f"{split}{i}", "text": f"{split} {i}", "label": ("good", "bad")[i % 2]} for i in range(4)]


def changed(split: str, row: int, **fields: Any) -> Callable[[str], list[dict[str, Any]]]:
    """The rows with other fields in one row of one split."""

    def read(name: str) -> list[dict[str, Any]]:
        given = rows(name)
        if name == split:
            given[row] |= fields
        return given

    return read


def task(read: Callable[[str], Any], labels: Sequence[str] = ("good", "bad"), **options: Any) -> None:
    register.register(
        "reviewed", read, TEMPLATE, options.pop("metric_fns", [metrics.accuracy]), labels=labels, **options
    )


def check(trained: bool = True) -> None:
    validation.check(["reviewed_1shot"], ["reviewed"] if trained else [], SPLITS)


def test_sound_rows_pass_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    task(rows)

    check()

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, r"Row 3 \(the first is 1\) of split 'test' of task 'reviewed', field 'text', is missing"),
        (float("nan"), "field 'text', is missing"),
        ("\ud83d", r"half a character, \\ud83d at 0"),
        ("café".encode("latin-1"), "is no UTF-8: byte 0xe9 at 3"),
        (["a"], "is a list; give a text"),
    ],
)
def test_a_field_that_is_no_text(value: Any, says: str) -> None:
    """Python's own codecs say what is no text: `str.encode`, `bytes.decode`."""
    task(changed("test", 2, text=value))

    with pytest.raises(UserError, match=says):
        check()


@pytest.mark.parametrize("value", [7, 0.5, True, 10**30])
def test_numbers_become_text_as_a_template_would_write_them(value: float) -> None:
    """The right value is `str.format`'s."""
    task(changed("test", 0, text=value))

    (example,) = [e for e in examples.read("reviewed", "test") if e.id == "test0"]

    assert example.inputs == TEMPLATE.inputs.format(text=value)


def test_bytes_are_decoded_and_a_byte_order_mark_is_no_text() -> None:
    """The right values are those of the codec `utf-8-sig`."""
    text = b"\xef\xbb\xbfcaf\xc3\xa9"
    task(changed("test", 0, text=text))

    assert f"Review: {text.decode('utf-8-sig')}\nLabel:" in {e.inputs for e in examples.read("reviewed", "test")}


def test_a_byte_order_mark_before_the_first_field_name() -> None:
    """What `csv.DictReader` and `json` make of a file that a spreadsheet saved: the first name starts with the mark."""
    task(lambda split: [{"\ufeffid": row["id"], "text": row["text"], "label": row["label"]} for row in rows(split)])

    assert {e.id for e in examples.read("reviewed", "test")} == {f"test{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "The rows of split 'train' of task 'reviewed' are a NoneType"),
        ({"text": ["a"]}, "are a dict; give a list of mappings"),
        ([("a", "good")], r"Row 1 \(the first is 1\) of split 'train' of task 'reviewed' is a tuple"),
        ([b"a"], r"Row 1 \(the first is 1\) of split 'train' of task 'reviewed' is a bytes"),
        (["a"], r"Row 1 \(the first is 1\) of split 'train' of task 'reviewed' is a str"),
        ("a\tgood", "are a str"),
        ([{"text": "a", "label": "good"}, {"text": "b"}], "Row 2 .* no field 'label'"),
        ([{"text": "a", "label": "good"}, {"id": "1", "text": "b", "label": "bad"}], "Row 2 .* no field 'id'"),
        ([], "has no row in its split 'train'"),
    ],
)
def test_rows_that_are_none(given: Any, says: str) -> None:
    task(lambda _: given)

    with pytest.raises(UserError, match=says):
        check()


def test_a_split_that_the_users_table_lacks() -> None:
    table = {split: rows(split) for split in ("train", "test")}
    task(table.__getitem__)

    with pytest.raises(UserError, match=r"Reading split 'validation' of task 'reviewed' fails \(KeyError"):
        check()


@pytest.fixture
def short_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split's first two rows are read as examples, the others are checked as they are in memory."""
    for module in (examples, validation):
        monkeypatch.setattr(module, "POOL_ROWS", 2)


@pytest.mark.usefixtures("short_pool")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label": "so so"}, r"The target of example 4 .* 'test3'.* split 'test' .* is 'so so', .* \['bad', 'good'\]"),
        ({"id": "test0"}, r"The id of example 4 .* 'test0'.* split 'test' .* is that of example 1 too"),
        ({"id": "test2"}, "The id of example 4 .* is that of example 3 too"),
    ],
)
def test_all_rows_in_memory_are_checked(fields: dict[str, str], says: str, trained: bool) -> None:
    task(changed("test", 3, **fields))

    with pytest.raises(UserError, match=says):
        check(trained)


@pytest.mark.usefixtures("short_pool")
def test_a_label_outside_among_the_last_rows_of_train() -> None:
    task(changed("train", 3, label="so so"))

    with pytest.raises(UserError, match=r"The target of example 4 .* split 'train' .* is 'so so'"):
        check()


@pytest.mark.usefixtures("short_pool")
def test_an_empty_input_among_the_last_rows() -> None:
    register.register(
        "reviewed", changed("test", 3, text=" "), templates.Template("{text}", "{label}"), [metrics.accuracy]
    )

    with pytest.raises(UserError, match=r"The input of example 4 .* of split 'test' of task 'reviewed' is empty"):
        check()


@pytest.mark.usefixtures("short_pool")
def test_labels_that_a_post_processor_makes_pass(capsys: pytest.CaptureFixture[str]) -> None:
    task(changed("test", 3, label="Bad"), postprocess_fn=lambda output, **_: output.strip().lower())

    check()

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ids", [True, False])
def test_rows_in_memory_are_filled_as_seqio_fills_them(ids: bool) -> None:
    """The reference is what SeqIO's data set yields."""
    given = [row | {"text": "\ufdd2caf\u00e9\ufdd3 {a} \0"} for row in rows("test")]
    task(lambda _: given if ids else [{"text": row["text"], "label": row["label"]} for row in given])
    found = examples.get("reviewed")
    assert isinstance(found.source, RowsSource)

    read = [(e.id, e.inputs, e.targets) for e in examples.stored(found, "test")]

    for start in (0, 3):
        assert list(found.source.filled("test", start, found.name)) == read[start:]


def test_tasks_that_share_their_rows_are_checked_each_by_its_template() -> None:
    source = RowsSource(rows, SPLITS, "shared")
    swapped = templates.Template("{label}", "{text}")
    for name, template in (("reviewed", TEMPLATE), ("swapped", swapped)):
        register.register(name, source, template, [metrics.accuracy])
    for name in ("reviewed", "swapped"):
        read = [(e.id, e.inputs, e.targets) for e in examples.stored(examples.get(name), "test")]
        assert list(source.filled("test", 0, name)) == read


def test_an_empty_label() -> None:
    """Of a task of SeqIO's own, since `register` refuses one."""
    task(rows)
    first = next(examples.stored(examples.get("reviewed"), "test"))
    empty = dataclasses.replace(first, labels=("good", " "))

    with pytest.raises(UserError, match=r"A label of example 1 .* is empty"):
        validation._check_split(examples.get("reviewed"), "test", [empty], print)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label": "so so"}, r"The target of example 2 .* 'test1'.* split 'test' .* is 'so so', .* \['bad', 'good'\]"),
        ({"label": ""}, "The target of example 2 .* is '', which is none of the labels"),
        ({"id": "test0"}, "The id of example 2 .* is that of example 1 too"),
    ],
)
def test_an_example_with_which_results_would_be_wrong(fields: dict[str, str], says: str) -> None:
    task(changed("test", 1, **fields))

    with pytest.raises(UserError, match=says):
        check()


def test_an_empty_input() -> None:
    register.register("reviewed", rows, templates.Template("", "{label}"), [metrics.accuracy])

    with pytest.raises(UserError, match=r"The input of example 1 .* of split 'train' of task 'reviewed' is empty"):
        check()


def test_a_task_that_is_tested_on_what_it_is_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    task(lambda _: rows("train"))

    with pytest.raises(
        UserError, match=r"All examples of split 'validation' of task 'reviewed' are examples of .*train"
    ):
        check()
    check(trained=False)  # in context: an example is never its own exemplar

    assert "4 of 4 examples of split 'test' are in 'validation' too" in capsys.readouterr().out


def test_warnings_have_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def read(split: str) -> list[dict[str, Any]]:
        given = [{"text": row["text"], "label": row["label"]} for row in rows(split)]
        if split == "test":
            given += [given[0], {"text": " ", "label": ""}, rows("train")[0]]
            given[-1].pop("id")
        return given

    task(read, labels=())

    check()
    check()  # said once

    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("Warning: task 'reviewed', split 'test': ") for line in lines] == [
        "1 rows have no text in field 'text'.",
        "1 rows have no text in field 'label'.",
        "1 examples have an empty target.",
        "1 examples are there before, with the same id, input and target.",
        "1 of 6 examples are in 'train' too.",
    ]


def _raises(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    raise ZeroDivisionError("no such thing")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (_raises, r"Metric '_raises' of task 'reviewed' fails \(ZeroDivisionError: no such thing, test_validation.py"),
        (lambda targets, predictions: 1.0, "fails .AttributeError"),
        (lambda targets, predictions: {"f1": "high"}, "fails .ValueError"),
        (lambda targets, predictions: {"f1": float("nan")}, "scores f1 = nan"),
        (lambda targets, predictions: {}, "has no metric"),
    ],
)
def test_metrics_are_tried_before_a_model_is_loaded(metric: Any, says: str) -> None:
    task(rows, metric_fns=[metric])

    with pytest.raises(UserError, match=says):
        check()


def test_a_post_processor_that_fails_without_an_answer() -> None:
    task(rows, labels=(), postprocess_fn=lambda output, **_: output.split()[0])

    with pytest.raises(
        UserError, match=r"Judging the output '' for example 'train0' of task 'reviewed' fails \(IndexError"
    ):
        check()


def test_ids_of_rows_that_have_one_are_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    task(rows)
    monkeypatch.setattr("promot_jax.data.rows.examples.stable_hash", lambda *parts: pytest.fail("hashed"))

    assert len(list(examples.stored(examples.get("reviewed"), "test"))) == 4


def test_rows_are_read_once() -> None:
    """By checks, exemplars and the stream together: a user's function may read a large file."""
    asked: list[str] = []

    def read(split: str) -> list[dict[str, Any]]:
        asked.append(split)
        return rows(split)

    task(read)
    check()
    examples.pool("reviewed")
    next(examples.stream("reviewed_1shot", "train", seed=0))

    assert sorted(asked) == ["test", "train", "validation"]
