"""A user's own data: CSV, TSV, JSON lines and Parquet files, folders of them, and data sets of the Hugging Face hub.

Rows keep the file and line that they come from, so that an error can name it.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from promot_jax.data import hub_datasets
from promot_jax.errors import UserError

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HUB = "hf://"
_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # by the byte order mark that a spreadsheet writes


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A user's own data as the task to fine-tune on; the comment of a field names its macro."""

    path: str = ""  # as of `read`; "" for none, DATA
    # Format strings over the columns, "{text} Is this good or bad?"; "" chooses by the names of the columns.
    inputs: str = ""  # INPUT_TEMPLATE
    targets: str = ""  # TARGET_TEMPLATE
    metric: str = ""  # name of a metric in `tasks/metrics.py`; "" chooses by the targets, METRIC

    @property
    def task(self) -> str:
        """The task's name: that of the file or folder, in letters, digits and underscores."""
        stem = Path(self.path.removeprefix(HUB).partition("@")[0].partition(":")[0]).stem
        name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
        return re.sub(r"(\d+)shot$", r"\1_shot", name) or "data"


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a file."""

    where: str  # "reviews.csv line 7"
    fields: Mapping[str, Any]  # by the names of the columns; values as the file has them


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All rows of a path."""

    path: str
    splits: Mapping[str, Sequence[Record]]  # by split; a single file is all "train"

    @functools.cached_property
    def digest(self) -> str:
        """Hash of splits and rows, whatever format they are stored in."""
        state = hashlib.sha256()
        for split, records in self.splits.items():
            for record in records:
                state.update(json.dumps([split, record.fields], sort_keys=True, default=str).encode() + b"\n")
        return state.hexdigest()[:32]

    @property
    def records(self) -> Iterator[Record]:
        """The rows of all splits."""
        return (record for records in self.splits.values() for record in records)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that every row has, in the order of the first row."""
        records = list(self.records)
        return [name for name in records[0].fields if all(name in record.fields for record in records)]


@functools.lru_cache(maxsize=4)
def read(path: str) -> DataSet:
    """Reads a data set, once per process.

    Args:
        path: a file (`.csv`, `.tsv`, `.jsonl`, `.parquet`); a folder with files of these kinds called `train`,
            `validation` and `test` (also `valid`, `val`, `dev`, and in parts: `train-00000-of-00002.parquet`); or
            `hf://organisation/name` (`hub_datasets.load`).

    Raises:
        UserError: nothing is there, of another kind, damaged, without rows, or with a row that does not fit the others;
            with file and line.
    """
    if path.startswith(HUB):
        tables = hub_datasets.load(path)
        splits = _by_split(path, {name: [(f"{path} {name}", rows)] for name, rows in tables.items()})
        return DataSet(path, splits)
    local = Path(path)
    try:
        there, is_folder = local.exists(), local.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        there = is_folder = False
    if not there:
        raise UserError(f"There is no data at {path!r}; set DATA to a file, a folder, or hf://organisation/name.")
    if not is_folder:
        return DataSet(path, {"train": _records(local)})
    found: dict[str, list[Path]] = {}
    for file in sorted(local.iterdir()):
        if file.suffix.lower() in _READERS:
            found.setdefault(re.split(r"[-_.]", file.name.lower())[0], []).append(file)
    if not found:
        raise UserError(f"The folder {path} has no file of a kind that is read ({', '.join(_READERS)}).")
    return DataSet(path, _by_split(path, {name: [(str(f), None) for f in files] for name, files in found.items()}))


def _by_split(
    path: str, found: Mapping[str, Sequence[tuple[str, Sequence[Mapping[str, Any]] | None]]]
) -> dict[str, list[Record]]:
    """Rows by our names of splits; `found` has, by the name that it goes by, files to read or rows of a table."""
    if unknown := sorted(found.keys() - _SPLIT_NAMES):
        if "train" not in map(_SPLIT_NAMES.get, found):
            raise UserError(
                f"{path} has {', '.join(map(repr, unknown))} and no split 'train'; call its files train, validation "
                "and test, or set DATA to one file."
            )
        print(
            f"{path}: {', '.join(map(repr, unknown))} is none of train, validation, test and is not read.", flush=True
        )
    splits: dict[str, list[Record]] = {}
    for name, sources in found.items():
        if split := _SPLIT_NAMES.get(name):
            for origin, rows in sources:
                records = _records(Path(origin)) if rows is None else _of_table(rows, origin)
                splits.setdefault(split, []).extend(records)
    if "train" not in splits:
        raise UserError(f"{path} has the splits {', '.join(splits)} and none called 'train'; add it.")
    return {split: splits[split] for split in SPLITS if split in splits}


def _records(file: Path) -> list[Record]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        hint = "; give one object per line (.jsonl)" if file.suffix.lower() == ".json" else ""
        raise UserError(f"{file} is no data file of a kind that is read ({', '.join(_READERS)}){hint}.")
    try:
        records = list(reader(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except UnicodeError as error:
        raise UserError(f"{file} is no UTF-8 text ({error}); save it as UTF-8.") from error
    if not records:
        raise UserError(
            f"{file} has no rows; the first line names the columns." if _is_table(file) else f"{file} is empty."
        )
    return records


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in (".csv", ".tsv")


def _open(file: Path) -> Any:
    """The file as text, line breaks as they are, without a byte order mark."""
    with file.open("rb") as start:
        encoding = _ENCODINGS.get(start.read(2), "utf-8-sig")
    return file.open(encoding=encoding, newline="")


def _unmarked(line: str) -> str:
    """The line without the byte order mark that it starts with where files were joined."""
    return line.removeprefix("\ufeff")


def _separated(file: Path) -> Iterator[Record]:
    """Rows of a CSV or TSV file; a CSV whose header has semicolons and no comma is separated by them."""
    csv.field_size_limit(2**31 - 1)  # 128 kB otherwise
    with _open(file) as text:
        header = text.readline()
        text.seek(0)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
        reader = csv.reader(map(_unmarked, text), delimiter=delimiter, strict=True)
        names: list[str] = []
        begins = 1
        try:
            for values in reader:
                where, begins = f"{file} line {begins}", reader.line_num + 1
                if not names:
                    names = _header([name.strip() for name in values], where)
                elif any(values):
                    if len(values) != len(names):
                        raise UserError(
                            f"{where} has {len(values)} fields and the header {len(names)}: put quotes around a text "
                            f"that contains {_SEPARATOR_NAMES[delimiter]} or a line break."
                        )
                    yield Record(where, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise UserError(f"{file} line {begins} cannot be read ({error}): look at its quotes.") from error


_SEPARATOR_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


def _header(names: list[str], where: str) -> list[str]:
    repeated = [name for name in names if names.count(name) > 1]
    if not all(names) or repeated:
        what = f"the column {repeated[0]!r} twice" if repeated and repeated[0] else "a column without a name"
        raise UserError(f"{where} has {what}; the first line names the columns.")
    return names


def _json_lines(file: Path) -> Iterator[Record]:
    with _open(file) as text:
        for number, line in enumerate(map(_unmarked, text), 1):
            if line.strip():
                where = f"{file} line {number}"
                try:
                    fields = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is no JSON ({error}); give one object per line.") from error
                if not isinstance(fields, dict):
                    raise UserError(f"{where} is no JSON object; give one per line, {{column: value}}.")
                yield Record(where, fields)


def _parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {file} needs the package pyarrow: pip install pyarrow.") from error
    try:
        rows = pyarrow.parquet.read_table(str(file)).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file} is no Parquet file that can be read: {' '.join(str(error).split())}.") from error
    yield from _of_table(rows, str(file))


def _of_table(rows: Sequence[Mapping[str, Any]], origin: str) -> list[Record]:
    return [Record(f"{origin} row {number}", row) for number, row in enumerate(rows, 1)]


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
