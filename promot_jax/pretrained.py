"""A base model from whatever lies at `INITIAL_CHECKPOINT_PATH`: a GGUF file, an asset, or a finished run's folder."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from promot_jax import assets, results, trees
from promot_jax.checkpoints import Checkpoints
from promot_jax.errors import UserError
from promot_jax.models import Model, build
from promot_jax.partitioning import Partitioner

if TYPE_CHECKING:
    from promot_jax.data.vocabularies import TokenizerVocabulary

STAGE_FILE = "stage.json"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to train or to ask.

    Attributes:
        model: family and config.
        params: `params["model"]`, float32, placed on the mesh.
        vocabulary: its tokenizer.
        base: fingerprint of the base model; a fine-tuned model has that of the one it started from.
        fingerprint: of these very parameters.
        path: where it was loaded from, as given.
        leaves: how many leaves were loaded, new and unused.
    """

    model: Model
    params: trees.Tree
    vocabulary: "TokenizerVocabulary"
    base: str
    fingerprint: str
    path: str
    leaves: dict[str, int]

    @property
    def accepts(self) -> tuple[str, ...]:
        """Fingerprints of the models whose prompts fit: itself, and the one it was fine-tuned from."""
        return (self.fingerprint, self.base)


def load(path: str, partitioner: Partitioner, *, dtype: str = "float32", dropout_rate: float = 0.0) -> Pretrained:
    """Loads a model; every leaf comes from the checkpoint, none is left at a random value.

    Args:
        path: "asset:NAME", a `.gguf` file, or the folder of a finished run that trained a model.
        partitioner: where the parameters go.
        dtype: of activations and products.
        dropout_rate: in training.

    Raises:
        UserError: nothing there, a format that is not read, or a checkpoint that does not fit its config.
    """
    stage = _stage_folder(Path(path))
    if stage is not None:
        return _load_stage(stage, path, partitioner, dtype=dtype, dropout_rate=dropout_rate)
    file = assets.resolve(path)
    if not file.is_file():
        raise UserError(
            f"No checkpoint at {path!r}; set INITIAL_CHECKPOINT_PATH to a .gguf file, asset:NAME, or the folder of a "
            "finished run."
        )
    from promot_jax.convert import gguf
    from promot_jax.data.vocabularies import TokenizerVocabulary

    config, params, metadata = gguf.read(file)
    config = dataclasses.replace(config, dtype=dtype, dropout_rate=dropout_rate)
    vocabulary = TokenizerVocabulary.from_gguf(metadata)
    base = trees.fingerprint(params)
    placed = partitioner.place({"model": params})["model"]
    leaves = {"loaded": len(trees.flatten(params)), "new": 0, "unused": 0}
    return Pretrained(build(config), placed, vocabulary, base, base, path, leaves)


def record(folder: Path, description: dict[str, Any]) -> None:
    """Marks a stage's folder as finished: what `load` and the next stage go by."""
    results.write(description, folder / STAGE_FILE)


def describe(folder: Path) -> dict[str, Any] | None:
    """Reads what `record` wrote, or None while the stage is not finished.

    Raises:
        UserError: the file is not one of ours.
    """
    try:
        description = json.loads((folder / STAGE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):  # `load` also asks about a .gguf file
        return None
    except ValueError as error:
        raise UserError(
            f"{folder / STAGE_FILE} is not readable ({error}); delete it to run the stage again."
        ) from error
    if not isinstance(description, dict) or not {"stage", "trains", "checkpoint", "base", "best_step", "curve"} <= set(
        description
    ):
        raise UserError(f"{folder / STAGE_FILE} does not describe a stage; delete it to run the stage again.")
    return description


def _stage_folder(path: Path) -> Path | None:
    """The folder of a stage that trained a model: the path itself, or that stage in a method's folder."""
    for folder in (path, path / "stage2", path / "finetune"):
        description = describe(folder)
        if description and description["trains"] == "model":
            return folder
    if path.is_dir():
        raise UserError(f"{path} holds no finished run that trained a model; give its folder, or a .gguf file.")
    return None


def _load_stage(folder: Path, path: str, partitioner: Partitioner, *, dtype: str, dropout_rate: float) -> Pretrained:
    description = describe(folder)
    assert description is not None
    source = load(description["checkpoint"], partitioner, dtype=dtype, dropout_rate=dropout_rate)
    if source.base != description["base"]:
        raise UserError(
            f"{folder} was trained from a base model {description['base'][:12]}, but {description['checkpoint']} now "
            f"holds {source.base[:12]}; put the old file back."
        )
    params = overlay(folder, description["best_step"], {"model": source.params})["model"]
    return dataclasses.replace(source, params=params, path=path, fingerprint=trees.fingerprint(params))


def overlay(folder: Path, step: int, params: trees.Tree) -> trees.Tree:
    """Returns the parameters with those that a stage trained taken from one of its checkpoints."""
    checkpoints = Checkpoints(folder / "checkpoints")
    saved = set(checkpoints.shapes(step))
    trained, frozen = trees.partition(params, lambda name: name in saved)
    merged = trees.merge(checkpoints.parameters(step, trained), frozen)
    checkpoints.close()
    return merged


def cast_weights(params: Any, dtype: str) -> Any:
    """Kernels and embeddings in the dtype they are multiplied in, which changes no product; norms stay float32."""
    flat = trees.flatten(params)
    names = ("kernel", "embedding")
    return trees.unflatten(
        {path: leaf.astype(jnp.dtype(dtype)) if path.endswith(names) else leaf for path, leaf in flat.items()}
    )
