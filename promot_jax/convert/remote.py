"""Checkpoints that lie elsewhere, brought to a local folder: `hf://org/name[@revision]` and `gs://bucket/folder`."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from promot_jax.errors import UserError

# What a Hugging Face folder is read from: never pickles, never code.
PATTERNS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.model",
)  # fmt: skip


def is_remote(path: str) -> bool:
    """Whether a path has to be fetched before it is read."""
    return path.startswith(("hf://", "gs://"))


def fetch(path: str) -> Path:
    """Returns the local folder with a remote checkpoint; what was fetched before is not fetched again.

    Raises:
        UserError: a malformed address, or nothing could be fetched from it.
    """
    return _from_hub(path) if path.startswith("hf://") else _from_bucket(path)


def _from_hub(path: str) -> Path:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", path, re.ASCII)
    if not match:
        raise UserError(f"{path!r} is no address of a model; write hf://ORGANISATION/NAME, if need be with @REVISION.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"Fetching {path} needs the package huggingface_hub: pip install promot_jax[hub].") from error
    try:
        folder = snapshot_download(match[1], revision=match[2], allow_patterns=list(PATTERNS))
    except Exception as error:  # its own errors, and those of whatever it fetches with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"Cannot fetch {path} from the Hugging Face hub: {reason}") from error
    return Path(folder)


def cache_folder() -> Path:
    """Where folders from buckets are kept: $PROMOT_CHECKPOINTS, or a folder below ~/.cache."""
    return Path(os.environ.get("PROMOT_CHECKPOINTS") or Path.home() / ".cache" / "promot_jax" / "checkpoints")


def _from_bucket(path: str) -> Path:
    """Copies the files of a Hugging Face folder; a changed one (by size or time) is another copy."""
    from etils import epath

    source = epath.Path(path)
    try:
        found = {file.name: file for file in source.iterdir() if any(Path(file.name).match(one) for one in PATTERNS)}
        stats = {name: file.stat() for name, file in sorted(found.items())}
        if "config.json" not in found:
            raise UserError(f"{path} holds no config.json; only Hugging Face folders are read from buckets.")
        listing = json.dumps([path, *((name, int(stat.length), int(stat.mtime)) for name, stat in stats.items())])
        target = cache_folder() / hashlib.sha256(listing.encode()).hexdigest()[:32]
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fetching-"))
            try:
                for name, file in found.items():
                    file.copy(scratch / name)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # TensorFlow's or fsspec's own errors, as epath passes them on
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"Cannot copy {path}: {reason}; copy the folder here by hand and give its path.") from error
    return target
