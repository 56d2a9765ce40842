"""What a method is made of. The other files here hold one method each.

A `Method` has a name, a label, hyperparameters and `Stage`s. A stage says which parameter subtrees it trains, what is
attached to the model meanwhile and what stays afterwards. Everything else defaults to plain fine-tuning, and a method
overrides what it does otherwise:

- `Objective`: the loss of a batch, from the tokens' losses (token weights, divergences);
- `Penalty`: a term of the parameters, added to the loss;
- `Candidates`: models that are made from weights, evaluated instead of training;
- `replay`, `freeze`, `optimizer`: data mixed in, parameters that stay, an optimizer other than the model's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from promot_jax.data.replay import Replay
from promot_jax.errors import UserError
from promot_jax.params.lora import Lora
from promot_jax.trees import Tree

Array = jax.Array


class BatchLosses(Protocol):
    """What an objective may compute of a batch; `training.objective` does it in chunks of the target positions."""

    @property
    def weights(self) -> Array:
        """1 at target tokens and 0 at padding, `[batch, targets]`."""

    def cross_entropy(self, token_weights: Array | None = None) -> Array:
        """Sum over target tokens of the cross-entropy, each times its weight `[batch, targets]`, in nats."""

    def divergence(self) -> Array:
        """Sum over target tokens of KL(start || trained) of the next token, in nats; start as in `uses_start`."""

    def per_token(self, measure: Callable[[Array, Array], Array], *, at_start: bool = False) -> Array:
        """`measure(log_probs [..., vocab], targets [...])` of every target token, `[batch, targets]`, no gradient.

        Of the model that is trained or, `at_start`, of the model at the stage's start (`Objective.uses_start`).
        """

    def mean_of_example(self, values: Array) -> Array:
        """At every target token the mean of `values` over the target tokens of its example; both `[batch, targets]`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a stage: the cross-entropy. Fields of a subclass are hyperparameters, recorded with the run."""

    uses_start: ClassVar[bool] = False  # whether it compares with the model at the stage's start

    @property
    def calibration_examples(self) -> int:
        """Training examples of each task whose losses at the stage's start it needs before training; 0 for none."""
        return 0

    def calibrated(self, losses: Sequence[float]) -> "Objective":
        """The objective that trains, given the mean loss per target token of each of those examples, in nats."""
        raise NotImplementedError

    def __call__(self, losses: BatchLosses) -> Array:
        """Sum over target tokens; the step divides it by their number in the whole batch."""
        return losses.cross_entropy()


class Penalty(Protocol):
    """A term of the parameters alone, a frozen dataclass; the step adds it to the loss per target token."""

    def __call__(self, model: Tree, start: Tree) -> Array:
        """The penalty of the trained leaves of the model, given those at the stage's start."""


class Candidates(Protocol):
    """Models between the base and the tuned one, in the place of training; a frozen dataclass."""

    def points(self) -> Mapping[int, Mapping[str, float]]:
        """What the evaluation of each candidate says besides its scores, by its `step` in the curve; 0 is the base."""

    def at(self, step: int, base: Tree, tuned: Tree) -> Tree:
        """The candidate's weights."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage."""

    name: str  # of its folder, and in curves
    # Parameter subtrees that it updates, of "model", "prompt" and "lora"; every other leaf stays bitwise as it is.
    trains: tuple[str, ...]
    prompt: bool = False  # whether each example's soft prompt is prepended to its input
    # How a prompt that no stage trains is drawn (`PromptInit.method`); "" for one that is trained.
    fixed_prompt: str = ""
    # Text whose tokens the prompt starts as, as many rows as they are; "{labels}" stands for the task's label set. ""
    # for `Experiment.prompt_init`.
    prompt_text: str = ""
    lora: Lora | None = None  # shape of the LoRA that is attached to the model, None for none
    # Whether LoRA is part of the model that the stage leaves, in context too. Otherwise it is removed like a prompt: it
    # serves the fine-tuned task only.
    keeps_lora: bool = False
    # Whether each task of a mixture has a prompt of its own, trained apart, in a folder of its own.
    per_task: bool = False
    # "lora" for `Tuning.lora_optimizer`; "", or where that is not set, for the budget's or the model's.
    optimizer: str = ""
    prompt_optimizer: str = ""  # the same of a prompt that is trained together with the model
    # Patterns over parameter paths that stay as they are, in the place of `Training.freeze`; None keeps that.
    freeze: tuple[str, ...] | None = None
    objective: Objective = Objective()  # the loss
    penalty: Penalty | None = None  # a term added to it, None for none
    replay: Replay | None = None  # generic text among the examples, None for none
    candidates: Candidates | None = None  # models to evaluate instead of training, None for training

    def __post_init__(self) -> None:
        """Raises UserError where the model at the start would meet a prompt that has changed since."""
        if "prompt" in self.trains and self.objective.uses_start:
            raise UserError(f"Stage {self.name} trains a prompt, which the model at its start does not know.")

    @property
    def tunes_model(self) -> bool:
        """Whether it leaves another model than it began with, also when prompts are taken away."""
        return "model" in self.trains or self.keeps_lora

    @property
    def leaves_prompt(self) -> bool:
        """Whether it leaves a prompt in a file of its own: one that it trained, or one that was drawn for it."""
        return "prompt" in self.trains or bool(self.fixed_prompt)

    @property
    def uses_start(self) -> bool:
        """Whether its step needs the model's trained leaves as they were at the stage's start."""
        return self.penalty is not None or self.objective.uses_start

    def recorded(self) -> dict[str, Any]:
        """Values beside `Training` that its result depends on, as `settings.json` holds them next to those."""
        hooks: list[Any] = [hook for hook in (self.objective, self.penalty, self.candidates) if hook is not None]
        values = {name: value for hook in hooks for name, value in dataclasses.asdict(hook).items()}
        if self.prompt_text:
            values["prompt_text"] = self.prompt_text
        parts = {"lora": self.lora, "replay": self.replay}
        return values | {name: dataclasses.asdict(part) for name, part in parts.items() if part is not None}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method; its dataclass fields are its hyperparameters, `Tuning.<field>` in gin.

    A field's name is the name of the quantity everywhere: the gin macro is the same in capitals, and a sweep, its
    folders and the results name it so.
    """

    name: ClassVar[str] = ""  # in METHOD and METHODS, in folders and results
    label: ClassVar[str] = ""  # in tables and figures
    style: ClassVar[int | None] = None  # line style in all figures; None for the next one that is free
    needs_mixture: ClassVar[bool] = False  # whether it makes sense on several tasks only

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, each from the best checkpoint of the one before; () trains nothing."""
        raise NotImplementedError

    @property
    def alone(self) -> Stage | None:
        """The stage that the job `train_stage` can run by itself; by default the only one."""
        return self.stages[0] if len(self.stages) == 1 and not self.needs_mixture else None

    def check(self) -> None:
        """Raises UserError where a hyperparameter is missing or would make it nothing but plain fine-tuning."""


def check_weight(name: str, weight: float) -> None:
    """Raises UserError for the weight of a term that is not positive and finite."""
    if not 0 < weight < float("inf"):
        raise UserError(f"{name} is {weight}, but has to be positive and finite: set {name.upper()}.")


def check_text(method: str, name: str, text: str) -> None:
    """Raises UserError for a method's text, the hyperparameter `name`, that is empty."""
    if not text:
        raise UserError(f"Method {method!r} needs a text: set {name.upper()}.")


def all_but(pattern: str) -> tuple[str, ...]:
    """`freeze` patterns that leave only those parameters of the model trained whose path `pattern` matches."""
    return (rf"model/(?!(?:{pattern})$).*",)


def log_prob(log_probs: Array, targets: Array) -> Array:
    """Log-probability of each target, `[...]`, from `[..., vocab]`; a measure for `BatchLosses.per_token`."""
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
