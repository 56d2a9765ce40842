"""How the stages of all methods train: two budgets, and what sets each of the others apart from plain fine-tuning."""

import dataclasses
from typing import Any

from promot_jax.data.replay import Replay
from promot_jax.errors import UserError
from promot_jax.methods.stages import Stage
from promot_jax.params import freezing
from promot_jax.params.lora import Lora
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of every stage; whatever tunes the model's own weights shares one budget and learning rate.

    Attributes:
        prompt: of stage 1, whether it trains a prompt or LoRA.
        model: of stage 2, of standard fine-tuning, and of everything that is compared with them.
        joint_prompt: optimizer of the prompt in joint tuning; None for that of `model`, as in the paper.
        lora: shape of LoRA.
        lora_optimizer: of LoRA, as stage 1 and as a rival; None for that of `model`.
        l2sp: weight of L2-SP.
        kl: weight of the divergence from the base model.
        replay: generic text, for the rival that replays some.
        freeze: for the rival that freezes layers, in the place of `model.freeze`: path patterns, or how many of the
            lowest layers stay as they are (`freezing.lower_layers`).
        alphas: of WiSE-FT; 0 is the base model, 1 the fine-tuned one.
    """

    prompt: Training
    model: Training
    joint_prompt: Optimizer | None = None
    lora: Lora = Lora()
    lora_optimizer: Optimizer | None = None
    l2sp: float = 0.01
    kl: float = 0.1
    replay: Replay | None = None
    freeze: int | tuple[str, ...] = ()
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    def of(self, stage: Stage) -> Training:
        """The settings of a stage.

        Raises:
            UserError: as `require`.
        """
        require(stage, self)
        training = self.model if stage.tunes_model else self.prompt
        changes: dict[str, Any] = {name: getattr(self, name) for name in stage.uses}
        if isinstance(frozen := changes.get("freeze"), int):
            changes["freeze"] = freezing.lower_layers(frozen)
        if stage.rank:
            changes["lora"] = dataclasses.replace(self.lora, rank=stage.rank)
        if "lora" in stage.trains:
            changes["optimizer"] = self.lora_optimizer or self.model.optimizer
            changes["freeze"] = ()  # `model.freeze` speaks of leaves that are all frozen here
        if stage.trains == ("model", "prompt"):
            changes["prompt_optimizer"] = self.joint_prompt
        return dataclasses.replace(training, **changes)


def require(stage: Stage, settings: Tuning | Training) -> None:
    """Raises UserError where a stage would be nothing but plain fine-tuning for want of a setting."""
    for name in stage.uses:
        if not getattr(settings, name):
            kind = type(settings).__name__
            raise UserError(f"Stage {stage.name!r} needs a value for {name!r}: set {kind}.{name}.")
