"""The folders of an export: Hugging Face models, adapters for PEFT, a T5X checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from promot_jax import files, trees
from promot_jax.checkpoints import export
from promot_jax.checkpoints.huggingface import load as hf
from promot_jax.checkpoints.huggingface import model_card, peft
from promot_jax.checkpoints.huggingface.model_card import Card
from promot_jax.checkpoints.locate import is_remote, spelled
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.checkpoints.trained_lora import TrainedLora
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError, nearest

FORMATS = ("huggingface", "peft", "t5x")
STRIPPED, PROMPTED, PEFT, T5X = "stripped", "with_prompts", "peft", "t5x/checkpoint_0"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What is exported."""

    base: Pretrained  # the model, LoRA that its run keeps merged into it
    prompts: Mapping[str, np.ndarray]  # soft prompts by name, `[length, embed]`
    lora: TrainedLora | None = None  # its run's LoRA
    dtype: str = "float32"  # of the Hugging Face folders
    card: Card = Card()  # where it comes from


def folders(formats: Sequence[str], *, prompts: bool, lora: bool = False) -> list[str]:
    """The folders of an export, in the order in which they are written.

    Args:
        formats: which to write, of `FORMATS`.
        prompts: whether there are soft prompts.
        lora: whether there is LoRA.

    Raises:
        UserError: an unknown format.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"Unknown export format {name!r}{nearest(name, FORMATS)}.")
    wanted = {STRIPPED: "huggingface" in formats, PROMPTED: "huggingface" in formats and prompts}
    wanted |= {PEFT: "peft" in formats and (prompts or lora), T5X: "t5x" in formats}
    return [name for name, is_wanted in wanted.items() if is_wanted]


def write(workdir: Path, name: str, exported: Exported) -> Path:
    """Writes one folder of an export, all or nothing, and returns it.

    Args:
        workdir: of the export.
        name: of the folder, as `folders` has it.
        exported: the model and what belongs to it.

    Raises:
        UserError: the folder is there already, or its format cannot hold the model.
    """
    target = workdir / name
    if name == T5X:
        from promot_jax.checkpoints.t5x import write as t5x

        t5x.write(target.parent, 0, exported.base.params)
    elif name == PEFT:
        with files.replacing(target) as folder:
            folder.mkdir()
            _write_adapters(folder, workdir, exported)
    else:
        prompts = exported.prompts if name == PROMPTED else None
        export.write(target, exported.base, prompts, exported.dtype, exported.card)
    return target


def _write_adapters(folder: Path, workdir: Path, exported: Exported) -> None:
    """An adapter in a folder of its own for each soft prompt, named like it, and for LoRA."""
    base, card = exported.base, exported.card
    family, config = export.described(base)
    stripped = card.hub or str((workdir / STRIPPED).resolve())
    export.token_names(exported.prompts)  # names that are no names of files either are refused
    for name, rows in exported.prompts.items():
        (folder / name).mkdir()
        peft.write_prompt(folder / name, family, config, np.asarray(rows, np.float32), stripped)
        readme = model_card.adapter(card, family, stripped, f"The soft prompt {name}", f"{PEFT}/{name}")
        model_card.write(folder / name, readme, card)
    if exported.lora:
        (folder / "lora").mkdir()
        origin = _base_of_lora(exported.lora, card.hub) or stripped
        params: trees.Tree = exported.lora.read(base.params, base.model.partitioner or Partitioner())
        peft.write_lora(folder / "lora", family, config, params, exported.lora.settings, origin)
        readme = model_card.adapter(card, family, origin, "LoRA", f"{PEFT}/lora")
        model_card.write(folder / "lora", readme, card)


def _base_of_lora(lora: TrainedLora, hub: str) -> str:
    """Where PEFT finds the model that LoRA is attached to; "" for the exported one.

    Raises:
        UserError: that model is in no format that PEFT loads, or on this machine only and the adapter is pushed.
    """
    path = spelled(lora.checkpoint)
    if not path or path.startswith("hf://"):
        return path.removeprefix("hf://")
    if not is_remote(path) and not hub and hf.is_folder(Path(path)):
        return str(Path(path).resolve())
    kind = "model of the Hugging Face hub" if hub else "Hugging Face folder"
    raise UserError(
        f"The LoRA in {lora.folder} belongs to {lora.checkpoint}, which is no {kind}, so that PEFT could not load them "
        "together: leave 'peft' out of EXPORT_FORMATS."
    )
