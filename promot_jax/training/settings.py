"""Settings of training: the budget of one stage (`Training`), and those of all methods' stages (`Tuning`)."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from promot_jax import methods
from promot_jax.errors import UserError, nearest
from promot_jax.methods.base import Method, Stage
from promot_jax.training.optimizer import Optimizer

WEIGHT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how a stage trains."""

    steps: int  # updates
    batch_size: int  # rows of one update, over all devices
    eval_period: int  # updates between evaluations; each writes a checkpoint
    optimizer: Optimizer  # with its learning rate, schedule and clipping
    dropout_rate: float = 0.0  # on activations
    label_smoothing: float = 0.0  # share of the target's probability spread over the vocabulary
    microbatches: int = 1  # parts a batch is worked through in, their gradients added up
    # Of the kernels and embeddings that are trained, between updates: "bfloat16" for half of their memory, with updates
    # rounded at random (`optimizer.apply_updates`).
    weight_dtype: str = "float32"
    # Patterns over parameter paths that stay as they are (`model/token_embedder/.*`), also of single layers of a stack
    # (`model/decoder/layers_[0-5]/.*`).
    freeze: tuple[str, ...] = ()
    # More examples per update: rows are filled with several, each with its own soft prompt prepended.
    pack: bool = False
    # The same examples per update in fewer or shorter rows (`data.packing`): equal to rounding, and no work on padding.
    # With dropout only shorter, and other values are dropped.
    pack_batch: bool = True
    log_period: int = 10  # updates between progress lines
    # Updates between checkpoints that stay for later analyses, a multiple of `eval_period`; 0: the newest and the best.
    keep_period: int = 0
    # First and last update to profile, (3, 5): XLA's trace and `summary.txt` in the stage's folder `profile/`.
    profile: tuple[int, ...] = ()
    prompt_optimizer: Optimizer | None = None  # of a prompt that is trained together with the model, else `optimizer`

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
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.steps):
            raise UserError(
                f"profile is {self.profile}; give the first and the last of the updates 1 to {self.steps} to profile, "
                "such as (3, 5), or ()."
            )
        if not (0 <= self.dropout_rate < 1 and 0 <= self.label_smoothing < 1):
            raise UserError("dropout_rate and label_smoothing lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of every method's stages; whatever tunes the model's own weights shares one budget and learning rate."""

    prompt: Training  # of stage 1, whether it trains a prompt or LoRA
    model: Training  # of stage 2, of standard fine-tuning, and of everything that is compared with them
    # Of single methods, by name: their hyperparameters (`Method`), and `<name>_optimizer` for the optimizers that
    # stages name. What is missing has its default: that of the method, or `model`'s optimizer.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def method(self, name: str) -> Method:
        """The method of a name with these hyperparameters, not yet checked (`Method.check`).

        Raises:
            UserError: no such method.
        """
        found = methods.find(name)
        names = [field.name for field in dataclasses.fields(found)]
        return found(**{name: self.settings[name] for name in names if name in self.settings})

    def of(self, stage: Stage) -> Training:
        """How a stage trains."""
        training = self.model if stage.tunes_model else self.prompt
        changes: dict[str, Any] = {} if stage.freeze is None else {"freeze": stage.freeze}
        if stage.optimizer:
            changes["optimizer"] = self._optimizer(stage.optimizer) or self.model.optimizer
        if stage.prompt_optimizer:
            changes["prompt_optimizer"] = self._optimizer(stage.prompt_optimizer) or training.prompt_optimizer
        return dataclasses.replace(training, **changes)

    def variable(self) -> dict[str, type]:
        """What a sweep can vary: learning rates and the hyperparameters that are numbers, each with its type."""
        found: dict[str, type] = {"learning_rate": float, "prompt_learning_rate": float}
        found |= {f"{name}_learning_rate": float for name in methods.optimizers() if self._optimizer(name)}
        for name, field in methods.hyperparameters().items():
            kinds = typing.get_args(field.type) or (field.type,)
            if float in kinds or int in kinds:
                found[name] = float if float in kinds else int
        return found

    def varied(self, values: Mapping[str, float]) -> "Tuning":
        """The settings with other values, by names of `variable`."""
        prompt, model, settings = self.prompt, self.model, dict(self.settings)
        for name, value in values.items():
            if name == "learning_rate":
                model = dataclasses.replace(model, optimizer=_at_rate(model.optimizer, value))
            elif name == "prompt_learning_rate":
                prompt = dataclasses.replace(prompt, optimizer=_at_rate(prompt.optimizer, value))
            elif name.endswith("_learning_rate"):
                key = name.replace("_learning_rate", "_optimizer")
                settings[key] = _at_rate(settings[key], value)
            else:
                settings[name] = value
        return Tuning(prompt, model, settings)

    def _optimizer(self, name: str) -> Optimizer | None:
        return self.settings.get(f"{name}_optimizer")


def _at_rate(optimizer: Optimizer, rate: float) -> Optimizer:
    return dataclasses.replace(optimizer, learning_rate=rate)


def tuning(prompt: Training, model: Training, **settings: Any) -> Tuning:
    """`Tuning` as gin configures it: every hyperparameter of every method, and every optimizer, is a parameter."""
    return Tuning(prompt, model, settings)


def _signature() -> inspect.Signature:
    hyperparameters = {name: (field.type, field.default) for name, field in methods.hyperparameters().items()}
    optimizers = {f"{name}_optimizer": (Optimizer | None, None) for name in methods.optimizers()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    budgets = dict.fromkeys(("prompt", "model"), (Training, inspect.Parameter.empty))
    every = budgets | hyperparameters | optimizers
    return inspect.Signature([inspect.Parameter(n, keyword, annotation=k, default=d) for n, (k, d) in every.items()])


tuning.__signature__ = _signature()  # type: ignore[attr-defined]  # what gin binds by
tuning.__annotations__ = {one.name: one.annotation for one in tuning.__signature__.parameters.values()}  # type: ignore[attr-defined]
