"""Soft prompts: the table of virtual token ids, initialisers, and files.

A model with `V` real tokens reads ids from `V` on as rows of the prompt table (`models.layers.Embed`). Attaching a
prompt prepends its ids to the input; stripping it leaves them out (paper, section 3). `params["prompt"]` is
`{task: [length, embed]}`; the table concatenates its entries in sorted order.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from promot_jax import files
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, nearest
from promot_jax.params.fingerprint import fingerprint

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

    Its method is "uniform" (`[-scale, scale]`, as in the paper), "uniform_positive" (`[0, scale]`; the prompt-tuning
    code base calls it uniform), "vocabulary" (rows of the embedding table, drawn without replacement), "labels" (the
    class labels, each the mean of its tokens; the other rows as "vocabulary"), "text" (the tokens of a text, repeated
    to length), or "file" (a saved prompt, or a bare `.npy`).
    """

    method: str = "uniform"
    scale: float = 0.5  # bound of the uniform range
    first: int = 0  # "vocabulary" and "labels" draw from so many first rows (frequent tokens); 0 is all
    text: str = ""  # of method "text"
    path: str = ""  # of method "file"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown method and values out of range."""
        if self.method not in METHODS:
            raise UserError(f"Unknown prompt initialiser {self.method!r}{nearest(self.method, METHODS)}.")
        if self.scale <= 0 or self.first < 0:
            raise UserError(f"A prompt's scale is positive and first is not negative, not {self.scale}, {self.first}.")

    def check(self, length: int) -> None:
        """Raises UserError where a prompt of `length` rows cannot be made so; without a model not all is known."""
        if self.method == "text" and not self.text.strip():
            raise UserError("The prompt initialiser 'text' was given an empty text; set PromptInit.text.")
        if self.method in ("vocabulary", "labels") and 0 < self.first < length:
            raise UserError(
                f"Cannot draw {length} prompt rows from the first {self.first} embeddings: raise PromptInit.first."
            )

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
            array, _ = _read(array_path(self.path))
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
    """The description of a saved prompt, in the JSON file beside its array."""

    task: str  # that the prompt was trained on
    length: int  # rows
    step: int  # of the checkpoint that it was taken from
    score: float | None  # target score there on the validation split, in [0, 100]
    initialiser: str  # `PromptInit.method`
    base: str  # fingerprint of the base model that it was trained on
    # Fingerprint of the array, which `save` adds; "" in files that were written without one.
    values: str = dataclasses.field(default="", compare=False)


def save(folder: str | os.PathLike[str], array: Any, info: PromptInfo) -> Path:
    """Writes `prompt.json` and then `prompt.npy` into a folder, each atomically; returns the array's path.

    All hosts call this; host 0 writes.

    Raises:
        UserError: the array is no prompt of finite numbers, or the task has no name.
    """
    path = Path(folder) / "prompt.npy"
    array = checked(np.asarray(hosts.whole(array), np.float32), f"The soft prompt for {path}")
    if not info.task:
        raise UserError(f"The soft prompt for {path} has no task: give the name of one.")
    info = dataclasses.replace(info, values=fingerprint({"prompt": array}))
    files.write(dataclasses.asdict(info), path.with_suffix(".json"))
    if hosts.is_writer():
        with files.replacing(path) as made:
            np.save(made, array, allow_pickle=False)
    return path


def load(
    path: str | os.PathLike[str], accepted: Sequence[str], force: bool = False, task: str = ""
) -> tuple[np.ndarray, PromptInfo]:
    """Reads a saved prompt.

    Args:
        path: the array file, its folder, or the working folder of the run that trained it; of prompt-tuning's
            checkpoints the newest. An array without description, as prompt-tuning releases them, needs a `task`.
        accepted: fingerprints of the base models whose prompts fit the model.
        force: also accept a prompt of another base model.
        task: name of an array without description.

    Returns:
        The array `[length, embed]`, float32, and its description.

    Raises:
        UserError: no prompt at the path, a damaged one, or one of another base model.
    """
    file = array_path(path)
    array, info = _read(file)
    if info is None:
        return array, undescribed(array, file, task)
    if info.base not in accepted and not force:
        raise UserError(
            f"The prompt {file} was trained on another base model ({info.base[:12]}, this one is "
            f"{accepted[0][:12]}); load the model it belongs to, or force it with Experiment.force_prompt = True."
        )
    return array, info


def _read(file: Path) -> tuple[np.ndarray, PromptInfo | None]:
    """Reads an array and the description beside it, None where there is none, and holds them against each other."""
    array, path = _read_array(file), file.with_suffix(".json")
    try:
        info = msgspec.convert(vars(PromptInfo(**json.loads(path.read_bytes()))), PromptInfo)
    except FileNotFoundError:
        return array, None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the description of a prompt: {error}.") from error
    if not info.task:
        raise UserError(f"{path} is not the description of a prompt: it names no task.")
    if info.length != len(array):
        raise UserError(f"{path} says {info.length} rows, but {file} holds {len(array)}.")
    if info.values not in ("", fingerprint({"prompt": array})):
        raise UserError(f"{file} holds other values than {path} describes; copy both again.")
    return array, info


def undescribed(array: np.ndarray, path: str | os.PathLike[str], task: str) -> PromptInfo:
    """Describes a prompt that came without description, and says that its base model is not verified.

    Raises:
        UserError: `task` is empty.
    """
    if not task:
        raise UserError(
            f"The prompt {os.fspath(path)} lacks its description prompt.json; copy both. If it has none (a released "
            "prompt), name it by PROMPT_TASK: its base model is then not verified."
        )
    print(f"The prompt {task!r} of {os.fspath(path)} has no description: its base model is not verified.", flush=True)
    return PromptInfo(task, len(array), step=0, score=None, initialiser="file", base="")


def array_path(path: str | os.PathLike[str]) -> Path:
    """Returns the file of a saved prompt, given as in `load`; raises UserError where there is none, or several are."""
    if not str(path):
        raise UserError("PROMPT_PATH is empty; set it to a prompt file or to stage 1's working folder.")
    root = Path(path)
    for place in ("", "prompt.npy", "prompt/prompt.npy", "stage1/prompt/prompt.npy"):
        if (root / place).is_file():
            return root / place
    # What prompt-tuning writes: `numpy_checkpoints/checkpoint_N/encoder.prompt.prompt.prompt`, after the parameter.
    steps = {
        int(found[1]): step
        for step in (*root.glob("checkpoint_*"), *root.glob("numpy_checkpoints/checkpoint_*"))
        if (found := re.fullmatch(r"checkpoint_(\d{1,18})", step.name))
    }
    for folder in (root, *(steps[step] for step in sorted(steps, reverse=True))):
        prompts = sorted(file for file in folder.glob("*prompt.prompt.prompt") if file.is_file())
        if len(prompts) > 1:
            names = ", ".join(file.name for file in prompts)
            raise UserError(f"{folder} holds {len(prompts)} prompts ({names}); give the file of one of them.")
        if prompts:
            return prompts[0]
    raise UserError(f"No prompt at {path}; give a prompt.npy or the working folder of a finished stage 1.")


def _read_array(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:  # np.load would also open archives
            array = np.lib.format.read_array(file, allow_pickle=False)
            if array.dtype == np.dtype("V2"):  # what NumPy makes of bfloat16, which it does not know
                array = array.view(jnp.bfloat16).astype(np.float32)
    except Exception as error:  # numpy parses the header as Python: a damaged one raises nearly anything
        raise UserError(f"{path} is not a prompt array (.npy): {error}.") from error
    return checked(array, str(path))


def checked(array: np.ndarray, origin: str) -> np.ndarray:
    """Returns a prompt as float32.

    Raises:
        UserError: its shape is not `[length, embed]`, or it holds values that are not finite numbers.
    """
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{origin} does not hold a prompt of shape [length, embed].")
    with np.errstate(over="ignore"):  # wider floats may overflow
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{origin} holds values that are not finite numbers; train the prompt again, or copy it again.")
    return array
