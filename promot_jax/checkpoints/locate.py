"""Remote checkpoints: `hf://org/name[@revision][/file.gguf]` and `gs://bucket/folder`.

They are copied to a local folder, except T5X's, whose arrays are read from the bucket one by one.
"""

import re
from pathlib import Path
from typing import Any

from promot_jax.checkpoints.remote_files import copied, reason
from promot_jax.errors import UserError

# The files of a Hugging Face folder that are read: never pickles, never code.
PATTERNS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.model",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip


def is_remote(path: str) -> bool:
    """Whether a path is a remote address."""
    return path.startswith(("hf://", "gs://"))


def spelled(path: str) -> str:
    """`hf://org/name` for `org/name` where nothing of that name, nor a folder `org`, is here; else the path itself."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path, re.ASCII) and len(path) < 200
    is_name = is_name and not path.endswith((".gguf", ".model"))
    return f"hf://{path}" if is_name and not Path(path.partition("/")[0]).exists() else path


def locate(path: str) -> Path:
    """Fetches a remote checkpoint once; returns a local folder or GGUF file, or a T5X checkpoint's path in its bucket.

    Raises UserError if the address is malformed, or nothing could be fetched from it.
    """
    return _from_hub(path) if path.startswith("hf://") else _from_bucket(path)


def _from_hub(path: str) -> Path:
    pattern = r"hf://([\w.-]+/[\w.-]+?)(?:@(refs/\w+/[\w.-]+|[\w.-]+|[\w./-]+?))?(?:/([\w.-]+(?:/[\w.-]+)*\.gguf))?"
    match = re.fullmatch(pattern, path, re.ASCII)
    if not match:
        raise UserError(
            f"{path!r} is no address of a model; write hf://ORGANISATION/NAME, optionally with @REVISION, and followed "
            "by its file (/NAME.gguf) for a model in GGUF."
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
    except Exception as error:  # its own errors, and those of its HTTP library
        raise UserError(f"Cannot fetch {path} from the Hugging Face hub: {reason(error)}") from error


def _from_bucket(path: str) -> Path:
    from etils import epath

    from promot_jax.checkpoints.t5x.load import is_checkpoint

    source: Any = epath.Path(path)
    try:
        if path.endswith(".gguf"):
            return copied(path, {source.name: source}) / source.name
        names = {file.name: file for file in source.iterdir()} if source.is_dir() else {}
        if "config.json" in names:
            files = {name: file for name, file in names.items() if any(map(Path(name).match, PATTERNS))}
            return copied(path, files)
        if is_checkpoint(source):
            return source
    except Exception as error:  # epath passes on errors of TensorFlow or fsspec
        raise UserError(f"Cannot copy {path}: {reason(error)}; copy it here by hand and give its path.") from error
    raise UserError(f"{path} holds neither a Hugging Face folder (config.json) nor a T5X checkpoint; give that of one.")
