"""Settings of a stage's training."""

import dataclasses
import math

from promot_jax.data.replay import Replay
from promot_jax.errors import UserError, nearest
from promot_jax.params.lora import Lora
from promot_jax.training.optimizer import Optimizer

WEIGHT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how a stage trains.

    Attributes:
        steps: updates.
        batch_size: rows of one update, over all devices.
        eval_period: updates between evaluations; each writes a checkpoint.
        optimizer: optimizer and schedule.
        dropout_rate: on activations.
        label_smoothing: share of the target's probability spread over the vocabulary.
        microbatches: parts a batch is worked through in, their gradients added up.
        weight_dtype: of the kernels and embeddings that are trained, between updates: "float32", or "bfloat16" for half
            of their memory, with updates rounded at random (`optim.apply_updates`).
        freeze: patterns over parameter paths that stay as they are (`model/token_embedder/.*`), also of single layers
            of a stack (`model/decoder/layers_[0-5]/.*`).
        pack: several examples per row, each behind its own prompt.
        log_period: updates between progress lines.
        keep_period: updates between checkpoints that stay for later analyses, a multiple of `eval_period`; 0 keeps only
            the newest and the best.
        prompt_optimizer: of a prompt that is trained together with the model; None for `optimizer`.
        lora: of a stage with LoRA.
        l2sp: weight of half the squared distance to the parameters at the stage's start (L2-SP, Li et al., 2018),
            beside the loss per target token; 0 is off.
        kl: weight of the divergence from the model at the stage's start, per target token; 0 is off.
        replay: generic text among the examples; None for none.
        alphas: of a stage that interpolates weights (WiSE-FT, Wortsman et al., 2022): shares of the tuned model.
    """

    steps: int
    batch_size: int
    eval_period: int
    optimizer: Optimizer
    dropout_rate: float = 0.0
    label_smoothing: float = 0.0
    microbatches: int = 1
    weight_dtype: str = "float32"
    freeze: tuple[str, ...] = ()
    pack: bool = False
    log_period: int = 10
    keep_period: int = 0
    prompt_optimizer: Optimizer | None = None
    lora: Lora | None = None
    l2sp: float = 0.0
    kl: float = 0.0
    replay: Replay | None = None
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be trained with."""
        if min(self.steps, self.batch_size, self.eval_period, self.microbatches, self.log_period) < 1:
            raise UserError("steps, batch_size, eval_period, microbatches and log_period must be at least 1.")
        if self.batch_size % self.microbatches:
            raise UserError(f"BATCH_SIZE {self.batch_size} does not divide into {self.microbatches} microbatches.")
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise UserError(f"Unknown weight_dtype {self.weight_dtype!r}{nearest(self.weight_dtype, WEIGHT_DTYPES)}.")
        if self.keep_period < 0 or self.keep_period % self.eval_period:
            raise UserError(
                f"keep_period is {self.keep_period}; checkpoints are written every {self.eval_period} steps (the "
                "evaluation period): give a multiple of that, or 0."
            )
        if not (0 <= self.dropout_rate < 1 and 0 <= self.label_smoothing < 1):
            raise UserError("dropout_rate and label_smoothing lie in [0, 1).")
        if not (0 <= self.l2sp < math.inf and 0 <= self.kl < math.inf):
            raise UserError(f"l2sp and kl are finite and not negative, not {self.l2sp} and {self.kl}.")
        if not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"The alphas between two models lie in [0, 1], not {self.alphas}.")
