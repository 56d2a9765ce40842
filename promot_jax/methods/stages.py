"""The stages of every method, as data: what each trains, and what stands in front of or beside the model meanwhile.

One loop (`promot_jax.training.loop`) runs them all. How a stage trains is in `promot_jax.training.tuning`; every table
of stage or method names is made here.
"""

import dataclasses

from promot_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: of its folder, and in curves.
        trains: rooms of the parameters that it updates, of "model", "prompt" and "lora"; every other leaf stays bitwise
            as it is.
        prompt: whether each example's soft prompt stands in front of its input.
        lora: whether LoRA is attached to the model.
        rank: of LoRA, where the method says so; 0 for that of the settings.
        keeps_lora: whether LoRA is part of the model that the stage leaves, in context too. Where it is not, it is
            taken away like a prompt: it serves the fine-tuned task only.
        per_task: whether each task of a mixture has a prompt of its own, trained apart, in a folder of its own.
        uses: fields of `tuning.Tuning` that set the stage apart from plain tuning of the same rooms.
    """

    name: str
    trains: tuple[str, ...]
    prompt: bool = False
    lora: bool = False
    rank: int = 0
    keeps_lora: bool = False
    per_task: bool = False
    uses: tuple[str, ...] = ()

    @property
    def tunes_model(self) -> bool:
        """Whether it leaves another model than it began with, also when prompts are taken away."""
        return "model" in self.trains or self.keeps_lora


STAGE1 = Stage("stage1", trains=("prompt",), prompt=True)
STAGE1_PER_TASK = dataclasses.replace(STAGE1, per_task=True)
STAGE2 = Stage("stage2", trains=("model",), prompt=True)
FINETUNE = Stage("finetune", trains=("model",))
JOINT = Stage("joint", trains=("model", "prompt"), prompt=True)
RANDOM_PROMPT = Stage("random_prompt", trains=("model",), prompt=True)
LORA_STAGE1 = Stage("stage1_lora", trains=("lora",), lora=True, uses=("lora",))
LORA_STAGE2 = Stage("stage2_lora", trains=("model",), lora=True, uses=("lora",))
LORA = Stage("lora", trains=("lora",), lora=True, keeps_lora=True, uses=("lora",))
L2SP = Stage("l2sp", trains=("model",), uses=("l2sp",))
KL = Stage("kl", trains=("model",), uses=("kl",))
REPLAY = Stage("replay", trains=("model",), uses=("replay",))
FREEZE = Stage("freeze", trains=("model",), uses=("freeze",))
# No update: the models between the one that fine-tuning began with and the one that it left.
WISE_FT = Stage("wise_ft", trains=("model",), uses=("alphas",))


def _promot_lora(rank: int) -> tuple[Stage, ...]:
    return tuple(dataclasses.replace(stage, rank=rank) for stage in (LORA_STAGE1, LORA_STAGE2))


# Paper section 3 (ProMoT) and section 4 (what it is compared with); then what a practitioner would try instead.
# "+ 1-shot" is any of them on the task's `_1shot` form.
METHODS: dict[str, tuple[Stage, ...]] = {
    "pretrained": (),
    "prompt_tuning": (STAGE1,),
    "finetune": (FINETUNE,),
    "joint": (JOINT,),
    "random_prompt": (RANDOM_PROMPT,),
    "promot": (STAGE1, STAGE2),
    "promot_lora": (LORA_STAGE1, LORA_STAGE2),
    **{f"promot_lora_r{rank}": _promot_lora(rank) for rank in (2, 4)},
    "multitask_finetune": (FINETUNE,),
    "multitask_promot": (STAGE1_PER_TASK, STAGE2),
    "lora": (LORA,),
    "wise_ft": (FINETUNE, WISE_FT),
    "l2sp": (L2SP,),
    "kl": (KL,),
    "replay": (REPLAY,),
    "freeze": (FREEZE,),
}
MULTITASK = ("multitask_finetune", "multitask_promot")  # methods that need a mixture

_ALL = [stage for plan in METHODS.values() for stage in plan]
STAGES = tuple(dict.fromkeys(stage.name for stage in _ALL))  # of a curve's points
# Step 0 of these is the model before any update.
MODEL_TUNING = tuple(dict.fromkeys(stage.name for stage in _ALL if stage.tunes_model))


def method(name: str) -> tuple[Stage, ...]:
    """Returns the stages of a method, in order.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{nearest(name, METHODS)}.")
    return METHODS[name]


def is_plain(name: str) -> bool:
    """Whether a method tunes the model with nothing in front of or beside it, which its target score could lean on."""
    plan = METHODS.get(name, ())
    return any(stage.tunes_model for stage in plan) and not any(
        stage.prompt or (stage.lora and not stage.keeps_lora) for stage in plan
    )
