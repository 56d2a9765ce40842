"""Files of a checkpoint read where they lie, local or at `gs://`, or copied to a local cache first."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError


def local(file: Path) -> Path:
    """Returns a file's local copy: itself, if it is not in a bucket.

    Raises:
        UserError: it cannot be copied.
    """
    if isinstance(file, Path):
        return file
    try:
        return copied(str(file), {file.name: file}) / file.name
    except Exception as error:  # as in `_from_bucket`
        raise UserError(f"Cannot copy {file}: {reason(error)}; copy the checkpoint here by hand.") from error


def reason(error: Exception) -> str:
    """The first line of what a library raised, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def cache_folder() -> Path:
    """Where copies from buckets are kept: $PROMOT_CHECKPOINTS, or a folder below ~/.cache."""
    return Path(os.environ.get("PROMOT_CHECKPOINTS") or Path.home() / ".cache" / "promot_jax" / "checkpoints")


def copied(path: str, files: Mapping[str, Any]) -> Path:
    """The folder with copies of files; when one has changed (by size or time) it is another folder."""
    stats = {name: file.stat() for name, file in sorted(files.items())}
    listing = json.dumps([path, *((name, int(stat.length), int(stat.mtime)) for name, stat in stats.items())])
    target = cache_folder() / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fetching-"))
        try:
            for name, file in files.items():
                file.copy(scratch / name)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
