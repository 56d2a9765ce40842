"""The methods: what each trains, and what sets it apart from plain fine-tuning. One file each, found by themselves."""

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

from promot_jax.data import shots
from promot_jax.errors import UserError, nearest
from promot_jax.methods.base import Method, Stage


def _discovered() -> dict[str, type[Method]]:
    """The methods of all files of this folder, by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {found.name: found for found in classes if issubclass(found, Method) and found.name}


METHODS = _discovered()
# The method without a stage: the pretrained model, which tables compare the others with.
REFERENCE = next(name for name, method in METHODS.items() if not method().stages)
# Paired differences: of every method to the baseline, and of ProMoT to every other method.
BASELINE, PROMOT = "finetune", "promot"


def find(name: str) -> type[Method]:
    """Returns the method of a name.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{nearest(name, METHODS)}.")
    return METHODS[name]


def parse(text: str) -> tuple[str, int]:
    """Splits `promot_1shot` into the method's name and the number of exemplars in front of every training input, or 0.

    Whether there is such a method is not looked at.
    """
    name, k = shots.split(text)
    is_form = text == f"{name}_{k}shot"  # a number without leading zeros
    return (name, k) if k and is_form and text not in METHODS else (text, 0)


def label(text: str) -> str:
    """What a method, with its exemplars, is called in tables and figures: `ProMoT + 1-shot`."""
    name, k = parse(text)
    plain = METHODS[name].label if name in METHODS else name.replace("_", " ")
    return f"{plain} + {k}-shot" if k else plain


@functools.cache
def stages() -> tuple[Stage, ...]:
    """All methods' stages, first stages before second ones."""
    placed = [(place, stage) for method in METHODS.values() for place, stage in enumerate(method().stages)]
    return tuple(stage for _, stage in sorted(placed, key=lambda pair: pair[0]))


def stage_names() -> tuple[str, ...]:
    """Names of all methods' stages."""
    return tuple(dict.fromkeys(stage.name for stage in stages()))


@functools.cache
def model_tuning() -> tuple[str, ...]:
    """Names of the stages that tune the model, in the order of `stages`; step 0 of their curves is no update yet."""
    return tuple(dict.fromkeys(stage.name for stage in stages() if stage.tunes_model))


def alone() -> dict[str, str]:
    """By name of a stage that can run by itself (`Method.alone`) the method that it belongs to."""
    return {stage.name: name for name, method in METHODS.items() if (stage := method().alone)}


def preceding(stage: str) -> list[str]:
    """Names of the stages that come right before a stage in some method."""
    plans = [[one.name for one in method().stages] for method in METHODS.values()]
    return list(dict.fromkeys(names[names.index(stage) - 1] for names in plans if stage in names[1:]))


def is_plain(name: str) -> bool:
    """Whether a method tunes the model with no prompt and no removed LoRA, on which its target score could depend."""
    plan = METHODS[name]().stages if name in METHODS else ()
    return any(stage.tunes_model for stage in plan) and not any(
        stage.prompt or (stage.lora and not stage.keeps_lora) for stage in plan
    )


def hyperparameters() -> dict[str, dataclasses.Field[Any]]:
    """The hyperparameters of all methods, by name."""
    return {field.name: field for method in METHODS.values() for field in dataclasses.fields(method)}


def optimizers() -> tuple[str, ...]:
    """Names of the optimizers that some stage has besides the budget's (`Stage.optimizer`)."""
    names = [name for stage in stages() for name in (stage.optimizer, stage.prompt_optimizer) if name]
    return tuple(dict.fromkeys(names))
