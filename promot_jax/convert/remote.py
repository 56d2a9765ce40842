"""Checkpoints that lie elsewhere: `hf://org/name[@revision][/file.gguf]` and `gs://bucket/folder`.

They are brought to a local folder, but for T5X's: their arrays are read from the bucket as they are asked for.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError

# What a Hugging Face folder is read from: never pickles, never code.
PATTERNS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.model",
)  # fmt: skip


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return path.startswith(("hf://", "gs://"))


def locate(path: str) -> Path:
    """Returns where a remote checkpoint can be read; what was fetched before is not fetched again.

    Returns:
        A local folder or GGUF file; or the folder of a T5X checkpoint in its bucket, which behaves as a path.

    Raises:
        UserError: a malformed address, or nothing could be fetched from it.
    """
    return _from_hub(path) if path.startswith("hf://") else _from_bucket(path)


def local(file: Path) -> Path:
    """Returns a file's local copy: itself, if it is not in a bucket.

    Raises:
        UserError: it cannot be copied.
    """
    if isinstance(file, Path):
        return file
    try:
        return _copied(str(file), {file.name: file}) / file.name
    except Exception as error:  # as in `_from_bucket`
        raise UserError(f"Cannot copy {file}: {_reason(error)}; copy the checkpoint here by hand.") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _from_hub(path: str) -> Path:
    pattern = r"hf://([\w.-]+/[\w.-]+?)(?:@(refs/\w+/[\w.-]+|[\w.-]+|[\w./-]+?))?(?:/([\w.-]+(?:/[\w.-]+)*\.gguf))?"
    match = re.fullmatch(pattern, path, re.ASCII)
    if not match:
        raise UserError(
            f"{path!r} is no address of a model; write hf://ORGANISATION/NAME, if need be with @REVISION, and with the "
            "name of its file behind it (/NAME.gguf) for one in GGUF."
        )
    repository, revision, file = match.groups()
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise UserError(f"Fetching {path} needs the package huggingface_hub: pip install promot_jax[hub].") from error
    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # its own errors, and those of whatever it fetches with
        raise UserError(f"Cannot fetch {path} from the Hugging Face hub: {_reason(error)}") from error


def cache_folder() -> Path:
    """Where copies from buckets are kept: $PROMOT_CHECKPOINTS, or a folder below ~/.cache."""
    return Path(os.environ.get("PROMOT_CHECKPOINTS") or Path.home() / ".cache" / "promot_jax" / "checkpoints")


def _from_bucket(path: str) -> Path:
    """The copy of a Hugging Face folder or of a GGUF file, or the place of a T5X checkpoint."""
    from etils import epath

    from promot_jax.convert import t5x

    source: Any = epath.Path(path)
    try:
        if path.endswith(".gguf"):
            return _copied(path, {source.name: source}) / source.name
        names = {file.name: file for file in source.iterdir()} if source.is_dir() else {}
        if "config.json" in names:
            files = {name: file for name, file in names.items() if any(Path(name).match(one) for one in PATTERNS)}
            return _copied(path, files)
        if t5x.is_checkpoint(source):
            return source
    except Exception as error:  # TensorFlow's or fsspec's own errors, as epath passes them on
        raise UserError(f"Cannot copy {path}: {_reason(error)}; copy it here by hand and give its path.") from error
    raise UserError(f"{path} holds neither a Hugging Face folder (config.json) nor a T5X checkpoint; give that of one.")


def _copied(path: str, files: Mapping[str, Any]) -> Path:
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
