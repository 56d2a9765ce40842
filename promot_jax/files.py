"""Atomic writes: a reader sees a whole file or folder, or none."""

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from promot_jax.distributed import hosts
from promot_jax.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT}  # errors of the system that a user's settings do not cause

_SCRATCH = ".writing-"  # in the names of folders that hold unfinished files
_HERE = re.sub(r"[^\w.]", "_", platform.node())  # this machine
_NUMBERS = re.compile(r"\[\n([\s\d.,eE+-]+)\n\s*\]")  # a list of numbers in indented JSON
# What earlier versions left when they were killed: files and folders of an export, half written.
_EARLIER = re.compile(
    r"\.[\w-]+\.(json|jsonl|md|html|svg)\.[a-z0-9_]{8}|prompt\.(json|npy)\.tmp"
    r"|\.(stripped|with_prompts)-[a-z0-9_]{8}|checkpoint_\d+\.tmp-[a-z0-9_]{8}"
)
_YOUNG, _OLD = 10, 3600  # seconds without a change after which a writer of this machine, of another one, is dead


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file or folder all or nothing: yields a path to make it at, and moves it to `path` at the end.

    The yielded path lies in a hidden folder beside `path`, which is deleted in any case. The parent folder is created.

    Args:
        path: of the file, which may be there already, or of a folder, which may not (or is empty).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}{_SCRATCH}{_HERE}-") as scratch,
        _locked(scratch),
    ):
        made = Path(scratch) / path.name
        yield made
        if made.is_file():
            with made.open("rb") as file:
                os.fsync(file.fileno())
        try:
            os.replace(made, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # by another process, since the caller looked
                raise UserError(f"{path} was made by another process meanwhile; it is left as it is.") from error
            raise


@contextlib.contextmanager
def _locked(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Locks a folder, which ends with the process at the latest; yields False where another process has locked it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # deleted by its owner
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # or the file system has no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(handle)


def delete_leftovers(folder: str | os.PathLike[str]) -> None:
    """Deletes what writers that were killed left below a folder; what a process is still writing stays."""
    for parent, names, found in os.walk(folder):  # which passes over folders that go meanwhile
        for name in filter(_EARLIER.fullmatch, found):
            Path(parent, name).unlink(missing_ok=True)
        for name in list(filter(_EARLIER.fullmatch, names)):
            names.remove(name)
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        for name in [name for name in names if name.startswith(".") and _SCRATCH in name]:
            names.remove(name)
            # A writer locks its folder right after it has made it. Not every file system shows locks to other machines.
            patience = _YOUNG if f"{_SCRATCH}{_HERE}-" in name else _OLD
            with _locked(scratch := Path(parent, name)) as dead:
                if dead and time.time() - _changed(scratch) > patience:
                    shutil.rmtree(scratch, ignore_errors=True)


def _changed(folder: Path) -> float:
    """When something in a folder was last changed, in seconds since the epoch; infinity if it is gone."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return math.inf


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file in UTF-8, all or nothing; creates its folder. Of several hosts, host 0 writes."""
    path = Path(path)
    if hosts.is_writer():
        with replacing(path) as made:
            # A lone surrogate in model output has no UTF-8; its backslash form is also what JSON would write.
            made.write_text(text, "utf-8", "backslashreplace", "\n")
    return path


def check_workdir(folder: Path) -> None:
    """Raises UserError for a folder of runs whose path reads as a pattern: Orbax looks for its files by patterns."""
    if glob.has_magic(str(folder.absolute())):
        raise UserError(f"The workdir {folder.absolute()} has one of * ? [ in its path: give another workdir.")


def write(value: Any, path: str | os.PathLike[str]) -> Path:
    """Writes a value or record as JSON, all or nothing; a list of numbers stands on one line.

    Raises:
        TypeError: something in it is not JSON, a record, an array or a scalar.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    # Text in JSON has no line break, so what lies between brackets on lines of its own is numbers.
    return write_text(path, _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Any]) -> Path:
    """Writes values or records as JSON lines, all or nothing."""
    return write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def plain(value: Any) -> Any:
    """Turns records, arrays, scalars, tuples and paths into plain JSON; a float that is not finite into None."""
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.to_builtins(value, enc_hook=_builtin))
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        return plain(value.tolist())
    return value


def _builtin(value: Any) -> Any:
    if (found := plain(value)) is value:
        raise TypeError(f"{type(value).__name__} is not JSON")
    return found
