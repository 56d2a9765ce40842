"""The stages of every method, as data: which parameters each trains and whether the prompt is attached."""

import dataclasses

from promot_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: of its folder, and in curves.
        trains: subtree of the parameters it updates, "prompt" or "model"; all others stay bitwise as they are.
        prompt: whether the task's soft prompt stands in front of the input.
    """

    name: str
    trains: str
    prompt: bool


STAGE1 = Stage("stage1", trains="prompt", prompt=True)
STAGE2 = Stage("stage2", trains="model", prompt=True)
FINETUNE = Stage("finetune", trains="model", prompt=False)

# Paper section 3 (ProMoT) and section 4 (what it is compared with).
METHODS: dict[str, tuple[Stage, ...]] = {
    "pretrained": (),
    "prompt_tuning": (STAGE1,),
    "finetune": (FINETUNE,),
    "promot": (STAGE1, STAGE2),
}


def method(name: str) -> tuple[Stage, ...]:
    """Returns the stages of a method, in order.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{nearest(name, METHODS)}.")
    return METHODS[name]
