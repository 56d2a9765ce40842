"""Records: typed JSON documents, read by one checking reader.

A record is a frozen `msgspec.Struct`. Keys that a type does not know are allowed in files, and ignored. `files.write`
writes records.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.errors import UserError

SCHEMA_VERSION = 1  # of files that are written; those of before versions were counted have none
replace = msgspec.structs.replace


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A JSON object with typed fields; fields at their default are not written, but those with the default `NULL`."""


class Document(Record, frozen=True, kw_only=True):
    """A whole file, which says the version of its layout."""

    schema_version: int = msgspec.field(default_factory=lambda: SCHEMA_VERSION)


# Default of a field that is written as null where it has no value.
NULL: Any = msgspec.field(default_factory=lambda: None)


class MissingError(UserError):
    """There is no such file."""


T = TypeVar("T")
_ADVICE = "restore it, or delete it and run the job that writes it again"


def parse(document: Any, kind: type[T], origin: str, advice: str = _ADVICE) -> T:
    """Checks plain JSON and makes a record of it.

    Args:
        document: objects, lists, text and numbers.
        kind: of the record.
        origin: names the document in messages.
        advice: what to do about a document that does not fit.

    Raises:
        UserError: the document does not fit the type, or is of a newer version.
    """
    version = document.get("schema_version", 0) if isinstance(document, dict) else 0
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(f"{origin} has the layout {version} of a newer promot_jax: read it with that version.")
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        reason, place = _located(str(error), document, kind)
        raise UserError(f"{origin} is not in its layout: {place or 'the whole file'}: {reason}; {advice}.") from None


def read(path: str | os.PathLike[str], kind: type[T], advice: str = _ADVICE) -> T:
    """Reads and checks a JSON file; `advice` says what to do about one that does not fit.

    Raises:
        MissingError: there is no such file.
        UserError: it is no JSON, or not in the layout of its type.
    """
    return parse(load(path, advice), kind, repr(str(path)), advice)


def load(path: str | os.PathLike[str], advice: str = _ADVICE) -> Any:
    """Reads a JSON file, compressed by gzip where its name ends in `.gz`; NaN and Infinity are refused.

    Raises:
        MissingError: there is no such file.
        UserError: it cannot be read, or is no JSON.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        document = json.loads(text, parse_constant=_refuse_constant)
        _check_depth(document)
        return document
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"There is no results file {str(path)!r}: run the job that writes it first.") from None
    # UnicodeDecodeError and JSONDecodeError are ValueErrors; the last two are of damaged gzip.
    except (OSError, ValueError, RecursionError, EOFError, zlib.error) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as JSON: {' '.join(str(error).split())[:200]}; {advice}."
        ) from None


def checked(record: T) -> T:
    """The record as a file would hold it: plain numbers, None for what is not finite.

    Raises:
        UserError: a value does not fit its field.
    """
    return parse(files.plain(record), type(record), f"A {type(record).__name__}")


def decide(function: Callable[[], T | None], kind: type[T], what: str) -> T | None:
    """`hosts.decide` of a record."""
    document = hosts.decide(lambda: files.plain(function()), what)
    return None if document is None else parse(document, kind, what)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_depth(document: Any, most: int = 100) -> None:
    """Raises ValueError for a document that is nested too deep for recursive functions."""
    level = [document]
    for _ in range(most):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {most} deep")


def _located(message: str, document: Any, kind: Any) -> tuple[str, str]:
    """What is wrong and where: msgspec's message, with the keys of objects that it writes as `[...]`."""
    reason, _, path = message.partition(" - at ")
    parts = path.strip("`").removeprefix("$").split("[...]")
    place, holder = parts[0], _inside(document, parts[0])
    for part in parts[1:]:
        key = next(key for key in list(holder) if _message_of_key(holder, key, document, kind) == message)
        place, holder = f"{place}.{key}{part}", _inside(holder[key], part)
    return reason, place.removeprefix(".")


def _inside(holder: Any, path: str) -> Any:
    """The member at a path such as `.curve[0].tasks`."""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        holder = holder[name] if name else holder[int(index)]
    return holder


def _message_of_key(holder: dict[str, Any], key: str, document: Any, kind: Any) -> str:
    """The message of msgspec where an object in the document holds this key alone."""
    others = {name: holder.pop(name) for name in list(holder) if name != key}
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        return str(error)
    finally:
        holder.update(others)
    return ""
