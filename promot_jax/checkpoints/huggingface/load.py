"""A Hugging Face model folder (config.json and safetensors, single or sharded) to our parameter tree, and its checks.

Everything in the folder is looked at before anything is allocated: the config, every header, every tensor's name, shape
and storage. No code of the folder runs and no pickle is opened.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from promot_jax.checkpoints import placement
from promot_jax.checkpoints.huggingface import config as hf_config
from promot_jax.checkpoints.huggingface import names, safetensors
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MAX_JSON = 1 << 26  # bytes of a config or an index
_MAX_SHARDS = 1024
_BLOCK_ROWS = 1024
# Names of a text model inside a model that also sees, brought to those of the text model alone.
_PREFIXES = {
    "language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head.",
}  # fmt: skip
# May be there and change nothing: buffers that older versions saved, and the part of a model that sees.
_UNUSED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|"
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight|"
    r"(model\.)?(vision_tower|multi_modal_projector)\..*"
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model from a folder."""

    family: str  # "decoder" or "t5"
    config: dict[str, Any]  # keyword arguments of the family's config, without those at their defaults
    placed: placement.Placed
    unused: tuple[str, ...]  # tensors of the folder that were not loaded


class _Held(NamedTuple):
    """A tensor of an open file."""

    file: safetensors.File
    key: str

    @property
    def stored(self) -> placement.Stored:
        return self.file.tensors[self.key]

    def rows(self, first: int, count: int) -> np.ndarray:
        return self.file.rows(self.key, first, count)


def is_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face model folder (a damaged one included)."""
    return (path / CONFIG).is_file()


def read(
    folder: Path,
    partitioner: Partitioner,
    without: Collection[str] = (),
    accept: Callable[[str, dict[str, Any]], object] = lambda family, config: None,
) -> Loaded:
    """Reads a model, each tensor straight to its place.

    Args:
        folder: with config.json and model.safetensors, or its index and shards.
        partitioner: where the parameters go.
        without: leaves that are not kept (`placement.load`).
        accept: is given the family and the config before any tensor is read, and may raise.

    Raises:
        UserError: a file is missing, damaged or leads out of the folder; the config asks for what our models do not
            compute; or tensors are missing, unexpected, or of the wrong shape, storage or values.
    """
    config_json = read_json(folder, CONFIG)
    with contextlib.ExitStack() as stack:
        held = _canonical([stack.enter_context(safetensors.opened(path)) for path in _shards(folder)], folder.name)
        family, kwargs = hf_config.read(config_json, held, f"{folder.name}/{CONFIG}")
        config = hf_config.full(family, kwargs)
        table = names.table(family, config)
        sources = names.sources(table, family, config, held)
        copies = {copy for name in table for copy in name.tensors}
        stored = {key: tensor.stored for key, tensor in held.items()}
        names.check(folder.name, table, sources, stored, lambda key: key in copies or _UNUSED.fullmatch(key))
        accept(family, kwargs)
        for name in table:
            first = sources[name.leaf][0]
            for copy in held.keys() & set(name.tensors) - {first}:
                _check_copy(folder.name, held[first], held[copy])
        entries = names.entries(table, sources, lambda leaf, source: held[source].rows)
        used = {source for found in sources.values() for source in found}
        return Loaded(family, kwargs, placement.load(entries, partitioner, without), tuple(sorted(held.keys() - used)))


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of a folder.

    Raises:
        UserError: it is missing, no ordinary file, or leads out of the folder (or, in the hub's own cache, where files
            are links, out of the repository).
    """
    if not re.fullmatch(r"(additional_chat_templates/)?[\w][\w.+-]*", name, re.ASCII) or len(name) > 255:
        raise UserError(f"{folder.name} names the file {name[:80]!r}, which is not a plain file name; fetch it again.")
    path, root = folder / name, folder.absolute()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{folder} lacks {name}; fetch it again.") from error
    if not found.is_relative_to(root.resolve()) or not found.is_file():
        raise UserError(f"{path} is not a file of that folder, but leads to {found}; put the file itself there.")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads an object of JSON in a folder; raises UserError if it is none, or is as `inside` refuses it."""
    path = inside(folder, name)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path} has {path.stat().st_size} bytes, too many for a {name}; fetch it again.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    value = safetensors.parse_json(data, str(path), "readable JSON")
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again.")
    return value


def _shards(folder: Path) -> list[Path]:
    """The files of a folder's tensors, each within it.

    A whole file wins over an index, as in transformers, which leaves an old index behind. What the files hold counts,
    not what the index says of them: of a complete model either may name tensors that the other does not.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        if not (folder / SINGLE).exists() and any(folder.glob("*.bin")):
            raise UserError(f"{folder} has its weights in pickle files, which are not opened; convert to safetensors.")
        return [inside(folder, SINGLE)]
    index = read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to file names; fetch it again.")
    shards = sorted(set(index.values()))
    if len(shards) > _MAX_SHARDS or not all(name.endswith(".safetensors") for name in shards):
        raise UserError(f"{folder / INDEX} names {len(shards)} files, at most {_MAX_SHARDS} .safetensors may be.")
    return [inside(folder, name) for name in shards]


def _canonical(files: Iterable[safetensors.File], origin: str) -> dict[str, _Held]:
    """The tensors of all files under the names of a text model that stands alone."""
    held: dict[str, _Held] = {}
    for file in files:
        for key in file.tensors:
            name = key
            for prefix, plain in _PREFIXES.items():
                if key.startswith(prefix):
                    name = plain + key.removeprefix(prefix)
            if name in held:
                raise UserError(f"{origin} holds tensor {name[:80]!r} twice; fetch it again.")
            held[name] = _Held(file, key)
    if "embed_tokens.weight" in held:  # saved without its head
        held = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in held.items()}
    return held


def _check_copy(origin: str, first: _Held, copy: _Held) -> None:
    """Raises UserError unless two tensors hold the same values; they are compared a block of rows at a time."""
    same = first.stored.shape == copy.stored.shape and copy.stored.readable
    for start in range(0, first.stored.shape[0], _BLOCK_ROWS) if same else ():
        count = min(_BLOCK_ROWS, first.stored.shape[0] - start)
        same = same and np.array_equal(first.rows(start, count), copy.rows(start, count))
    if not same:
        raise UserError(
            f"{origin} holds {copy.key!r} with other values than {first.key!r}, which our model of this config shares "
            "with it; check tie_word_embeddings in its config.json."
        )
