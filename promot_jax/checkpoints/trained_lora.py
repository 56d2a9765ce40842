"""The LoRA of a finished run, apart from the model: what an adapter is written from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from promot_jax import methods, trees
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.stage_folder import STAGE_FILE, describe, overlay
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.params.lora import Lora
from promot_jax.results import records


@dataclasses.dataclass(frozen=True)
class TrainedLora:
    """LoRA in a stage's folder."""

    folder: Path  # of the stage
    step: int  # of its best checkpoint
    settings: Lora  # rank, alpha and targets
    checkpoint: str  # path of the model that it is attached to; "" for the model that the run left

    def read(self, params: trees.Tree, partitioner: Partitioner) -> trees.Tree:
        """Reads `params["lora"]`.

        Args:
            params: `params["model"]` of the model, for the shapes.
            partitioner: where the leaves go.
        """
        fresh = partitioner.place({"lora": self.settings.init(jax.random.key(0), params)})
        return overlay(self.folder, self.step, fresh, some=True)["lora"]


def find(path: str) -> TrainedLora | None:
    """Finds the LoRA of the run at a path, as `pretrained.load` takes it; None where it has none.

    LoRA that a run keeps is part of the model that it left, and is attached to the base model. LoRA that serves the
    fine-tuned task alone (ProMoT with LoRA) is attached to the model that the run left.

    Raises:
        UserError: the record of the stage is damaged.
    """
    stages = pretrained.trained_by(path)
    if not stages:
        return None
    folder, stage = stages[0]
    if stage.lora:
        settings = records.parse(stage.lora, Lora, f"'lora' in {folder / STAGE_FILE}")
        return TrainedLora(folder, stage.best_step, settings, stage.checkpoint)
    for name in methods.preceding(stage.stage):
        first = describe(folder.parent / name)
        if first and "lora" in first.trains:
            file = folder.parent / name / "settings.json"
            training = records.read(file, dict[str, Any]).get("training", {})
            settings = records.parse(training.get("lora"), Lora, f"'lora' in {file}")
            return TrainedLora(file.parent, first.best_step, settings, "")
    return None
