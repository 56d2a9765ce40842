"""generation_config.json beside the ends of answers (`checkpoints.answers`): what of it changes the greedy answer.

Every key of transformers' GenerationConfig is in one of three groups. What is part of the model has to be neutral; a
preference is named and not applied; lengths, beams, sampling and speed are a run's own (`decoding.settings`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promot_jax.checkpoints.huggingface.config import family_of
from promot_jax.checkpoints.huggingface.load import CONFIG, read_json
from promot_jax.errors import UserError

GENERATION = "generation_config.json"
# Key -> its neutral values.
OF_THE_MODEL: Mapping[str, tuple[Any, ...]] = {"forced_bos_token_id": (None,), "forced_eos_token_id": (None,)}
START = ("decoder_start_token_id", "bos_token_id")  # of an encoder-decoder's answer: the first that is set
PREFERENCES: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None, []), "min_length": (None, 0),
    "min_new_tokens": (None, 0), "exponential_decay_length_penalty": (None,), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "sequence_bias": (None, [], {}), "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0), "dola_layers": (None,), "stop_strings": (None, []), "constraints": (None, []),
    "force_words_ids": (None, []), "forced_decoder_ids": (None, []), "token_healing": (None, False),
    "watermarking_config": (None,),
}  # fmt: skip


def read(folder: Path) -> list[str]:
    """Reads what a model's folder says of generation, in the file that transformers reads it from.

    Returns:
        The preferences that change greedy answers and that we do not apply, as "key = value".

    Raises:
        UserError: an answer that our models would start or end otherwise, or a damaged file.
    """
    config = read_json(folder, CONFIG)
    name = GENERATION if os.path.lexists(folder / GENERATION) else CONFIG
    values = read_json(folder, name)
    if name == CONFIG and isinstance(text := config.get("text_config"), dict):  # of a model that also sees
        values = text | values
    neutral = dict(OF_THE_MODEL)
    if family_of(config.get("model_type")) == "t5":
        neutral[next((key for key in START if values.get(key) is not None), START[0])] = (None, 0)
    for key, allowed in neutral.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{folder / name} sets {key} = {repr(values[key])[:80]}, which our models do not compute; take it out "
                "if answers without it are meant."
            )
    suppressed, size = values.get("suppress_tokens"), config.get("vocab_size")
    if suppressed and isinstance(size, int) and suppressed == [*range(size - len(suppressed), size)]:
        values = values | {"suppress_tokens": None}  # soft prompts as tokens, in our own exports: never generated
    return [f"{key} = {repr(values[key])[:80]}" for key in PREFERENCES if values.get(key) not in PREFERENCES[key]]
