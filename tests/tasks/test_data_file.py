"""A user's file as a SeqIO task: what is chosen by the data, printed, and registered."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import seqio

from promot_jax.data import examples
from promot_jax.data.chat import ChatTemplate
from promot_jax.data.files import DataFile
from promot_jax.errors import UserError
from promot_jax.tasks import data_file

pytestmark = pytest.mark.usefixtures("registry")


def write(path: Path, rows: list[dict[str, Any]]) -> DataFile:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return DataFile(str(path))


def reviews(count: int = 200) -> list[dict[str, Any]]:
    return [{"text": f"Film {i}", "label": ("good", "bad")[i % 3 % 2]} for i in range(count)]


def test_a_csv_file_is_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write(tmp_path / "seen.csv", reviews())
    assert data_file.register_data(settings) == "seen"
    assert data_file.register_data(settings) == "seen"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # printed once
    assert "200 rows, columns text, label" in lines[0]
    assert "Labels: 'bad' (67 rows), 'good' (133 rows)." in lines[2] and "Metric: accuracy" in lines[3]
    by_split = {split: examples.read("seen", split) for split in ("train", "validation", "test")}
    sizes = {split: len(members) for split, members in by_split.items()}
    assert lines[4].startswith(
        f"  Splits: train {sizes['train']}, validation {sizes['validation']}, test {sizes['test']}; "
    )
    found = {(e.inputs, e.targets) for members in by_split.values() for e in members}
    assert found == {(f"Text: {row['text']}\nLabel:", row["label"]) for row in reviews()}
    assert {e.labels for members in by_split.values() for e in members} == {("bad", "good")}
    assert seqio.get_mixture_or_task("seen_4shot").splits


def test_splits_depend_on_the_input_alone(tmp_path: Path) -> None:
    """Not on other rows, nor on their order; equal inputs are never in two splits."""
    split_of = []
    for name, rows in (("one", reviews(200)), ("two", reviews(260)[::-1] + reviews(50))):
        data_file.register_data(write(tmp_path / f"{name}.csv", rows))
        split_of.append(
            {e.inputs: split for split in ("train", "validation", "test") for e in examples.read(name, split)}
        )
        total = sum(len(examples.read(name, split)) for split in ("train", "validation", "test"))
        assert total == len(rows) and len(split_of[-1]) == len({row["text"] for row in rows})
    assert all(split_of[1][inputs] == split for inputs, split in split_of[0].items())
    shares = [list(split_of[1].values()).count(split) / 260 for split in ("validation", "test")]
    assert all(0.05 < share < 0.17 for share in shares)


def test_splits_that_are_given_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my_films"
    folder.mkdir()
    write(folder / "train.csv", reviews(150))
    write(folder / "dev.csv", reviews(12))
    data_file.register_data(DataFile(str(folder)))
    assert len(examples.read("my_films", "validation")) == 12
    out = capsys.readouterr().out
    assert "test by a hash of each row's input" in out and "validation by" not in out


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"few.csv has too few rows .* to take a split '\w+' from: give more, or a folder"
    ):
        data_file.register_data(write(tmp_path / "few.csv", reviews(3)))


@pytest.mark.parametrize(
    ("targets", "labels", "metric"),
    [
        (["1", "2", "3"], ("1", "2", "3"), "accuracy"),
        (["yes ", "no"], ("no", "yes"), "accuracy"),
        (["only one"], (), "exact_match"),
        ([f"city {i}" for i in range(60)], (), "exact_match"),
        ([f"a sentence of more than five words {i}" for i in range(60)], (), "rouge2"),
        (["a label of six words here", "another of six words in all"], (), "rouge2"),
    ],
)
def test_labels_and_metric_by_the_targets(
    tmp_path: Path, targets: list[str], labels: tuple[str, ...], metric: str
) -> None:
    rows = [{"input": f"question {i}", "target": targets[i % len(targets)]} for i in range(120)]
    data_file.register_data(write(tmp_path / "asked.csv", rows))
    task = seqio.get_mixture_or_task("asked")
    assert examples.read("asked", "train", limit=1)[0].labels == labels
    assert task.metric_fns[0].name == metric


def test_a_metric_of_the_user(tmp_path: Path) -> None:
    path = str(tmp_path / "asked.csv")
    write(tmp_path / "asked.csv", reviews())
    data_file.register_data(DataFile(path, metric="bleu"))
    assert seqio.get_mixture_or_task("asked").metric_fns[0].name == "bleu"
    write(tmp_path / "other.csv", reviews())
    with pytest.raises(UserError, match=r"METRIC is 'belu', which is no metric \(did you mean 'bleu'\?\)"):
        data_file.register_data(DataFile(str(tmp_path / "other.csv"), metric="belu"))


def test_answers_of_several_lines_are_scored_whole(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"first {i}\nsecond"} for i in range(100)]
    data_file.register_data(write(tmp_path / "lines.jsonl", rows))
    task = seqio.get_mixture_or_task("lines")
    assert task.postprocess_fn(" a\nb ", is_target=False) == "a\nb"


@pytest.mark.parametrize(("ids", "kept"), [(lambda i: f"r{i}", True), (lambda i: "same", False), (lambda i: "", False)])
def test_ids_of_the_file_where_they_are_ids(tmp_path: Path, ids: Any, kept: bool) -> None:
    rows = [{"id": ids(i), **row} for i, row in enumerate(reviews())]
    data_file.register_data(write(tmp_path / "named.csv", rows))
    found = {example.id for example in examples.read("named", "train")}
    assert found <= {f"r{i}" for i in range(200)} if kept else len(found) > 100


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"A task called 'capital' is registered already: rename .*capital.csv"):
        data_file.register_data(write(tmp_path / "capital.csv", reviews()))


def test_a_chat(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"Film {i}?"}, {"role": "assistant", "content": "good"}] for i in range(99)]
    settings = write(tmp_path / "talk.jsonl", [{"messages": messages} for messages in chats])
    template = ChatTemplate("<s>{{ messages[0].content }}", ("<s>",))
    with pytest.raises(UserError, match="is a chat, for which a model's chat template is needed"):
        data_file.register_data(settings)
    data_file.register_data(settings, lambda: template)
    inputs = {example.inputs for example in examples.read("talk", "train")}
    assert inputs <= {template.split(messages, "")[0] for messages in chats} and "\ufdd2" in min(inputs)


def test_marks_in_other_data_are_no_control_tokens(tmp_path: Path) -> None:
    rows = [{"input": f"\ufdd2<s>\ufdd3 {i}", "target": f"answer {i}"} for i in range(99)]
    data_file.register_data(write(tmp_path / "marked.jsonl", rows))
    assert all(example.inputs.startswith("<s> ") for example in examples.read("marked", "train"))
