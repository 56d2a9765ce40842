"""A user's files, as spreadsheets and scripts write them; the references are Python's and pyarrow's writers."""

import csv
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from promot_jax.data import files
from promot_jax.data.files import DataFile
from promot_jax.errors import UserError

ROWS = [
    {"text": "Good, and long.", "label": "good"},
    {"text": 'She said "no".\nTwice.', "label": "bad"},
    {"text": "caf\u00e9 \u2028 end", "label": "good"},
]


def table(rows: list[dict[str, str]], **options: Any) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    files.read.cache_clear()
    return [dict(record.fields) for record in files.read(str(path)).records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("breaks", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.CSV", ";"), ("a.tsv", "\t")])
def test_tables_as_spreadsheets_save_them(
    tmp_path: Path, encoding: str, breaks: str, name: str, delimiter: str
) -> None:
    text = table(ROWS, delimiter=delimiter, lineterminator=breaks)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_were_joined(tmp_path: Path, encoding: str) -> None:
    """Each with its byte order mark, as its codec writes it."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line.encode(encoding) for line in lines))
    assert read(tmp_path / "a.jsonl") == ROWS
    header, *rows = (table([row], lineterminator="\n").partition("\n") for row in ROWS)
    parts = ["".join(header), *(row for _, _, row in rows)]
    (tmp_path / "b.csv").write_bytes(b"".join(part.encode(encoding) for part in parts))
    assert read(tmp_path / "b.csv") == ROWS


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_json_lines(tmp_path: Path, start: str) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "a.jsonl").write_bytes((start + "\r\n\n".join(lines)).encode())
    assert read(tmp_path / "a.jsonl") == ROWS


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"b.parquet is no Parquet file"):
        files.read(str(tmp_path / "b.parquet"))


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow: pip install pyarrow"):
        files.read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b'text,label\n"a\nb",good\nc,d,e\n', "a.csv line 4 has 3 fields and the header 2: put quotes"),
        ("a.csv", b'text,label\n"a"b,good\n', "a.csv line 2 cannot be read"),
        ("a.csv", b'text,label\na,good\n"b,bad\n', "a.csv line 3 cannot be read"),
        ("a.csv", b"text,text\na,b\n", "a.csv line 1 has the column 'text' twice"),
        ("a.csv", b"text,\na,b\n", "a.csv line 1 has a column without a name"),
        ("a.csv", b"text,label\n", "a.csv has no rows"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", "text,label\ncaf\u00e9,b\n".encode("latin-1"), "a.csv is no UTF-8 text .*; save it as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl line 2 is no JSON object"),
        ("a.jsonl", b'{"a": ' * 100_000, "a.jsonl line 1 is no JSON"),
        ("a.json", b"[]", r"a.json is no data file .*; give one object per line \(.jsonl\)"),
        ("a.xlsx", b"", r"a.xlsx is no data file of a kind that is read \(.csv, .tsv"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["nowhere.csv", "x" * 3000, "a\0b"])
def test_nothing_there(path: str) -> None:
    with pytest.raises(UserError, match="There is no data at"):
        files.read(path)


def test_a_folder_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train-00001-of-00002.csv").write_text(table(ROWS[1:]))
    (tmp_path / "train-00000-of-00002.csv").write_text(table(ROWS[:1]))
    (tmp_path / "dev.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "README.md").touch()
    files.read.cache_clear()
    data = files.read(str(tmp_path))
    assert {split: [dict(r.fields) for r in rows] for split, rows in data.splits.items()} == {
        "train": ROWS,
        "validation": ROWS[:1],
    }
    assert "'notes' is none of train, validation, test and is not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reviews.csv", "has 'reviews' and no split 'train'"),
        ("test.csv", "none called 'train'"),
        ("a.md", "has no file"),
    ],
)
def test_a_folder_without_training_rows(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_text(table(ROWS))
    with pytest.raises(UserError, match=says):
        files.read(str(tmp_path))


def test_the_digest_is_that_of_the_rows(tmp_path: Path) -> None:
    """Whatever format they are in; any other value is another digest."""
    digests = []
    for name, content in {
        "a.csv": table(ROWS),
        "b.csv": "\ufeff" + table(ROWS, quoting=csv.QUOTE_ALL),
        "c.jsonl": "\n".join(map(json.dumps, ROWS)),
        "d.csv": table([*ROWS[:2], ROWS[2] | {"label": "bad"}]),
        "e.csv": table(ROWS[::-1]),
    }.items():
        (tmp_path / name).write_text(content, "utf-8", newline="")
        digests.append(files.read(str(tmp_path / name)).digest)
    assert len(set(digests[:3])) == 1 and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/My Reviews-2.csv", "my_reviews_2"),
        ("reviews", "reviews"),
        ("hf://org/Some.Set:config@main", "some"),
        ("ab_4shot.csv", "ab_4_shot"),
        ("\u00e9.csv", "data"),
    ],
)
def test_the_task_is_named_after_the_file(path: str, name: str) -> None:
    assert DataFile(path).task == name


class Hub:
    """A stand-in for the package `datasets`: its `load_dataset`, tables of rows and features."""

    class Table(list[dict[str, Any]]):
        features = types.MappingProxyType({"text": object(), "label": types.SimpleNamespace(names=["neg", "pos"])})

    def load_dataset(self, name: str, configuration: str | None, revision: str | None) -> dict[str, "Hub.Table"]:
        if name != "org/set":
            raise ConnectionError("no such data set")
        self.asked = (name, configuration, revision)
        return {"train": Hub.Table([{"text": "a", "label": 1}]), "test": Hub.Table([{"text": "b", "label": -1}])}


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = files.read("hf://org/set:plain@v1")
    assert hub.asked == ("org/set", "plain", "v1")
    assert [dict(record.fields) for record in data.records] == [
        {"text": "a", "label": "pos"},
        {"text": "b", "label": None},
    ]
    assert [record.where for record in data.records] == [
        "hf://org/set:plain@v1 train row 1",
        "hf://org/set:plain@v1 test row 1",
    ]
    with pytest.raises(UserError, match=r"Cannot load hf://org/other: no such data set"):
        files.read("hf://org/other")
    with pytest.raises(UserError, match=r"write hf://organisation/name"):
        files.read("hf://org")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install promot_jax\[datasets\]"):
        files.read("hf://org/set")
