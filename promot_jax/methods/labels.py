"""How methods are called in tables."""

import re

PRETRAINED = "pretrained"
LABELS = {  # of every method (`stages.METHODS`)
    PRETRAINED: "pretrained",
    "prompt_tuning": "prompt tuning",
    "finetune": "fine-tuning",
    "joint": "joint tuning",
    "random_prompt": "fixed random prompt",
    "promot": "ProMoT",
    "promot_lora": "ProMoT with LoRA",
    "promot_lora_r2": "ProMoT with LoRA r=2",
    "promot_lora_r4": "ProMoT with LoRA r=4",
    "multitask_finetune": "multi-task fine-tuning",
    "multitask_promot": "multi-task ProMoT",
    "lora": "LoRA",
    "wise_ft": "WiSE-FT",
    "l2sp": "L2-SP",
    "kl": "KL to base",
    "replay": "replay",
    "freeze": "frozen layers",
}
_WITH_SHOTS = re.compile(r"(.+)_(\d+)shot")  # trained with exemplars before every input


def label(method: str) -> str:
    """How a method is called in tables and figures."""
    if found := _WITH_SHOTS.fullmatch(method):
        return f"{label(found[1])} + {found[2]}-shot"
    return LABELS.get(method, method.replace("_", " "))
