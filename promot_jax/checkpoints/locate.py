"""Checkpoints that lie elsewhere: `hf://org/name[@revision][/file.gguf]` and `gs://bucket/folder`.

They are brought to a local folder, but for T5X's: their arrays are read from the bucket as they are asked for.
"""

import re
from pathlib import Path
from typing import Any

from promot_jax.checkpoints.remote_files import copied, reason
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
        raise UserError(f"Cannot fetch {path} from the Hugging Face hub: {reason(error)}") from error


def _from_bucket(path: str) -> Path:
    """The copy of a Hugging Face folder or of a GGUF file, or the place of a T5X checkpoint."""
    from etils import epath

    from promot_jax.checkpoints.t5x.load import is_checkpoint

    source: Any = epath.Path(path)
    try:
        if path.endswith(".gguf"):
            return copied(path, {source.name: source}) / source.name
        names = {file.name: file for file in source.iterdir()} if source.is_dir() else {}
        if "config.json" in names:
            files = {name: file for name, file in names.items() if any(Path(name).match(one) for one in PATTERNS)}
            return copied(path, files)
        if is_checkpoint(source):
            return source
    except Exception as error:  # TensorFlow's or fsspec's own errors, as epath passes them on
        raise UserError(f"Cannot copy {path}: {reason(error)}; copy it here by hand and give its path.") from error
    raise UserError(f"{path} holds neither a Hugging Face folder (config.json) nor a T5X checkpoint; give that of one.")
