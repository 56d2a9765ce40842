"""Reads files of a checkpoint, local or at `gs://`, in place or from a copy in a local cache."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError
from promot_jax.files import delete_leftovers, replacing


def local(file: Path) -> Path:
    """Returns a file's local copy, or the file itself if it is not in a bucket; raises UserError if copying fails."""
    if isinstance(file, Path):
        return file
    try:
        return copied(str(file), {file.name: file}) / file.name
    except Exception as error:  # as in `_from_bucket`
        raise UserError(f"Cannot copy {file}: {reason(error)}; copy the checkpoint here by hand.") from error


def reason(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def copied(path: str, files: Mapping[str, Any]) -> Path:
    """Copies files to a folder of their own in $PROMOT_CHECKPOINTS (or below ~/.cache), and returns it.

    A file that changed (by size or time) leads to another folder.
    """
    cache = Path(os.environ.get("PROMOT_CHECKPOINTS") or Path.home() / ".cache" / "promot_jax" / "checkpoints")
    stats = {name: file.stat() for name, file in sorted(files.items())}
    listing = json.dumps([path, *((name, int(stat.length), int(stat.mtime)) for name, stat in stats.items())])
    target = cache / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if not target.is_dir():
        delete_leftovers(cache)
        with replacing(target) as scratch:
            scratch.mkdir()
            for name, file in files.items():
                file.copy(scratch / name)
    return target
