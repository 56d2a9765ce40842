"""Soft prompts: the table of virtual token ids, initialisers, and files.

A model with `V` real tokens reads ids from `V` on as rows of the prompt table (`models.layers.Embed`). Attaching a
prompt prepends its ids to the input; stripping it leaves them out (paper, section 3). `params["prompt"]` is
`{task: [length, embed]}`; the table concatenates its entries in sorted order.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, nearest

Array = jax.Array


def layout(prompt: Mapping[str, Any] | None, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns each task's virtual ids, `{task: int32 [length]}`."""
    ids: dict[str, np.ndarray] = {}
    for task, rows in sorted((prompt or {}).items()):
        ids[task] = np.arange(vocab_size, vocab_size + rows.shape[0], dtype=np.int32)
        vocab_size += rows.shape[0]
    return ids


def table(prompt: Mapping[str, Array] | None) -> Array | None:
    """Returns `[all rows, embed]` in the order of `layout`, or None without a prompt."""
    return jnp.concatenate([prompt[task] for task in sorted(prompt)]) if prompt else None


METHODS = ("uniform", "uniform_positive", "vocabulary", "labels", "text", "file")


@dataclasses.dataclass(frozen=True)
class PromptInit:
    """The initialiser of a soft prompt.

    Attributes:
        method: "uniform" (`[-scale, scale]`, as in the paper), "uniform_positive" (`[0, scale]`; the prompt-tuning
            code base calls it uniform), "vocabulary" (rows of the embedding table, drawn without replacement),
            "labels" (the class labels, each the mean of its tokens; the other rows as "vocabulary"), "text" (the
            tokens of a text, repeated to length), or "file" (a saved prompt, or a bare `.npy`).
        scale: bound of the uniform range.
        first: "vocabulary" and "labels" draw from the first `first` rows (frequent tokens); 0 is all.
        text: of method "text".
        path: of method "file".
    """

    method: str = "uniform"
    scale: float = 0.5
    first: int = 0
    text: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for an unknown method and values out of range."""
        if self.method not in METHODS:
            raise UserError(f"Unknown prompt initialiser {self.method!r}{nearest(self.method, METHODS)}.")
        if self.scale <= 0 or self.first < 0:
            raise UserError(f"A prompt's scale is positive and first is not negative, not {self.scale}, {self.first}.")

    def rows(
        self,
        key: Array,
        length: int,
        shape: tuple[int, int],
        lookup: Callable[[Array], Array],
        encode: Callable[[str], Sequence[int]],
        labels: Sequence[str] = (),
    ) -> Array:
        """Returns the initial prompt, `[length, embed]`, float32.

        Args:
            key: random key.
            length: rows.
            shape: of the model's embedding table, `[vocab, embed]`.
            lookup: token ids `[n]` to the input embeddings of the model, `[n, embed]` (`Model.input_rows`).
            encode: text to token ids.
            labels: label set of the task, for method "labels".

        Raises:
            UserError: the length, text, file, rows or labels do not fit the method.
        """
        if length < 1:
            raise UserError(f"PROMPT_LENGTH is {length}; a soft prompt needs at least one row.")
        vocab, embed = shape
        if self.method in ("uniform", "uniform_positive"):
            low = -self.scale if self.method == "uniform" else 0.0
            return jax.random.uniform(key, (length, embed), minval=low, maxval=self.scale)
        if self.method == "text":
            ids = list(encode(self.text))
            if not ids:
                raise UserError("The prompt initialiser 'text' was given an empty text; set PromptInit.text.")
            return lookup(jnp.resize(jnp.asarray(ids), (length,))).astype(jnp.float32)
        if self.method == "file":
            array = _read_array(_array_path(self.path))
            if array.shape != (length, embed):
                raise UserError(
                    f"The prompt in {self.path} has shape {array.shape}; PROMPT_LENGTH and the model ask for "
                    f"{(length, embed)}."
                )
            return jnp.asarray(array)
        population = self.first or vocab
        if not length <= population <= vocab:
            raise UserError(f"Cannot draw {length} prompt rows from the first {population} of {vocab} embeddings.")
        drawn = lookup(jax.random.choice(key, population, (length,), replace=False)).astype(jnp.float32)
        if self.method == "vocabulary":
            return drawn
        if not labels:
            raise UserError("The prompt initialiser 'labels' needs a task with a label set; use 'vocabulary' instead.")
        means = [lookup(jnp.asarray(list(encode(label)))).mean(axis=0) for label in labels[:length]]
        return drawn.at[: len(means)].set(jnp.stack(means))


@dataclasses.dataclass(frozen=True)
class PromptInfo:
    """The description of a saved prompt, in the JSON file beside its array.

    Attributes:
        task: that the prompt was trained on.
        length: rows.
        step: of the checkpoint that it was taken from.
        score: target score there on the validation split, in [0, 100], or None.
        initialiser: `PromptInit.method`.
        base: fingerprint of the base model that it was trained on.
    """

    task: str
    length: int
    step: int
    score: float | None
    initialiser: str
    base: str


def save(folder: str | os.PathLike[str], array: Any, info: PromptInfo) -> Path:
    """Writes `prompt.json` and then `prompt.npy` into a folder, each atomically; returns the array's path.

    All hosts call this; host 0 writes.
    """
    path = Path(folder) / "prompt.npy"
    array = np.asarray(hosts.whole(array), np.float32)
    files.write(dataclasses.asdict(info), path.with_suffix(".json"))
    if hosts.is_writer():
        with files.replacing(path) as made:
            np.save(made, array, allow_pickle=False)
    return path


def load(path: str | os.PathLike[str], accepted: Sequence[str], force: bool = False) -> tuple[np.ndarray, PromptInfo]:
    """Reads a saved prompt.

    Args:
        path: the array file, its folder, or the working folder of the run that trained it.
        accepted: fingerprints of the base models whose prompts fit the model.
        force: also accept a prompt of another base model.

    Returns:
        The array `[length, embed]`, float32, and its description.

    Raises:
        UserError: no prompt at the path, a damaged one, or one of another base model.
    """
    array_path = _array_path(path)
    array = _read_array(array_path)
    description = array_path.with_suffix(".json")
    try:
        info = PromptInfo(**json.loads(description.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"The prompt {array_path} lacks its description {description.name}; copy both.") from error
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{description} is not the description of a prompt: {error}.") from error
    if info.length != array.shape[0]:
        raise UserError(f"{description} says {info.length} rows, but {array_path} holds {array.shape[0]}.")
    if info.base not in accepted and not force:
        raise UserError(
            f"The prompt {array_path} was trained on another base model ({info.base[:12]}, this one is "
            f"{accepted[0][:12]}); load the model it belongs to, or force it with Experiment.force_prompt = True."
        )
    return array, info


def _array_path(path: str | os.PathLike[str]) -> Path:
    if not str(path):
        raise UserError("PROMPT_PATH is empty; set it to a prompt file or to stage 1's working folder.")
    for place in ("", "prompt.npy", "prompt/prompt.npy", "stage1/prompt/prompt.npy"):
        if (Path(path) / place).is_file():
            return Path(path) / place
    raise UserError(f"No prompt at {path}; give a prompt.npy or the working folder of a finished stage 1.")


def _read_array(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:  # np.load would also open archives
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: a damaged one raises nearly anything
        raise UserError(f"{path} is not a prompt array (.npy): {error}.") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(f"{path} does not hold a prompt of shape [length, embed].")
    return array.astype(np.float32)
