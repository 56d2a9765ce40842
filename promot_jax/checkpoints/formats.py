"""The folders of an export: Hugging Face models, adapters for PEFT, a T5X checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
STEP = 1  # of the T5X checkpoint: T5X does not find one of step 0 by its parent folder
STRIPPED, PROMPTED, BASE, PEFT, T5X = "stripped", "with_prompts", "base", "peft", f"t5x/checkpoint_{STEP}"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What is exported."""

    base: Pretrained  # the model, LoRA that its run keeps merged into it
    prompts: Mapping[str, np.ndarray]  # soft prompts by name, `[length, embed]`
    lora: TrainedLora | None = None  # its run's LoRA
    load_base: Callable[[], Pretrained] | None = None  # loads the model that LoRA is attached to, for `base/`
    dtype: str = "float32"  # of the Hugging Face folders
    card: Card = Card()  # where it comes from


def folders(formats: Sequence[str], *, prompts: bool, lora: TrainedLora | None = None, hub: str = "") -> list[str]:
    """The folders of an export, in the order in which they are written.

    Args:
        formats: which to write, of `FORMATS`.
        prompts: whether there are soft prompts.
        lora: of the model's run; where that keeps it and PEFT cannot load the base model from where it is, `base/` is
            among the folders.
        hub: "org/name" where the export is pushed to.

    Raises:
        UserError: an unknown format, or an adapter whose base model is not on the hub.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"Unknown export format {name!r}{nearest(name, FORMATS)}.")
    needs_base = "peft" in formats and lora is not None and bool(lora.checkpoint) and not _address(lora, hub)
    if needs_base and lora and hub:
        raise UserError(
            f"The LoRA in {lora.folder} belongs to {lora.checkpoint}, which is not on the Hugging Face hub, so that "
            "PEFT could not load it from there: leave 'peft' out of EXPORT_FORMATS."
        )
    chosen = {STRIPPED: "huggingface" in formats, PROMPTED: "huggingface" in formats and prompts, BASE: needs_base}
    chosen |= {PEFT: "peft" in formats and (prompts or lora is not None), T5X: "t5x" in formats}
    return [name for name, is_chosen in chosen.items() if is_chosen]


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

        t5x.write(target.parent, STEP, exported.base.params)
    elif name == PEFT:
        with files.replacing(target) as folder:
            folder.mkdir()
            _write_adapters(folder, workdir, exported)
    elif name == BASE:
        assert exported.load_base is not None
        base = exported.load_base()
        export.write(target, base, None, exported.dtype, Card(base_model=base.path, license=exported.card.license))
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
        if "lora" in exported.prompts:
            raise UserError("A soft prompt called 'lora' would lie where the LoRA does: give it another name.")
        (folder / "lora").mkdir()
        kept = _address(exported.lora, card.hub) or str((workdir / BASE).resolve())
        origin = kept if exported.lora.checkpoint else stripped
        params: trees.Tree = exported.lora.read(base.params, base.model.partitioner or Partitioner())
        peft.write_lora(folder / "lora", family, config, params, exported.lora.settings, origin)
        readme = model_card.adapter(card, family, origin, "LoRA", f"{PEFT}/lora")
        model_card.write(folder / "lora", readme, card)


def _address(lora: TrainedLora, hub: str) -> str:
    """Where PEFT finds the model that LoRA was trained on; "" where it cannot load it, or another reader could not."""
    path = spelled(lora.checkpoint)
    if path.startswith("hf://"):
        return path.removeprefix("hf://")
    local = not hub and path and not is_remote(path) and hf.is_folder(Path(path))
    return str(Path(path).resolve()) if local else ""
