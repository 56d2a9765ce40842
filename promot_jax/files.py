"""Atomic writes of text, JSON and JSON lines."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promot_jax import files
from promot_jax.distributed import hosts


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes outputs as JSON lines, all or nothing."""
    files.write_text(path, "".join(json.dumps(files.plain(dict(row)), ensure_ascii=False) + "\n" for row in rows))


Json = dict[str, Any]


def write(results: Json, path: str | os.PathLike[str]) -> Path:
    """Writes a run or a comparison as JSON, all or nothing: a reader never sees half a file.

    Raises:
        TypeError: something in it is not JSON, an array or a scalar.
    """
    return write_text(path, json.dumps(plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file in UTF-8, all or nothing; creates its folder. Of several hosts, host 0 writes."""
    path = Path(path)
    if not hosts.is_writer():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # A lone surrogate in model output has no UTF-8; its backslash form is also what JSON would write.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; this one is as open as any other
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def plain(value: Any) -> Any:
    """Turns arrays, NumPy and JAX scalars, tuples and paths into plain JSON; a float that is not finite into None."""
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
