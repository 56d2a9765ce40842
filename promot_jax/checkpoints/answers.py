"""What an instruct model's files say about its answers: the tokens that end one, and its chat template."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from promot_jax.checkpoints.huggingface import load as hf
from promot_jax.checkpoints.huggingface.generation import GENERATION
from promot_jax.data.vocabularies.gguf import END_NAMES
from promot_jax.errors import UserError

TOKENIZER = "tokenizer_config.json"
TEMPLATE, FURTHER_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


class Answers(NamedTuple):
    """How a model's answers end, and how its conversations are written."""

    end_ids: tuple[int, ...] = ()  # tokens that end an answer, beside the tokenizer's own end of sequence
    chat_template: str | dict[str, str] | None = None  # Jinja; several by name; None for none


def of_folder(folder: Path, tokenizer: Path | None = None) -> Answers:
    """Reads a Hugging Face folder as transformers does.

    The ends are those of `generation_config.json`, or those of `config.json` where that names none.

    Args:
        folder: of the model.
        tokenizer: its tokenizer's, if that is another.

    Raises:
        UserError: a file is damaged, or leads out of the folder.
    """
    ends: tuple[int, ...] = ()
    for name in (GENERATION, hf.CONFIG):
        if not ends and os.path.lexists(folder / name):
            config = hf.read_json(folder, name)
            text = config.get("text_config")  # of a model that also sees
            ids = (config if "eos_token_id" in config or not isinstance(text, dict) else text).get("eos_token_id")
            ends = _ids(ids, folder / name)
    return Answers(ends, template_of(tokenizer or folder))


def template_of(folder: Path) -> str | dict[str, str] | None:
    """The chat template of a tokenizer's folder: its own files, or else the entry of `tokenizer_config.json`.

    Raises:
        UserError: a file is damaged, or leads out of the folder.
    """
    folder = folder.parent if folder.is_file() else folder  # VOCABULARY may name the tokenizer's file
    further = sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))
    files = {path.stem: f"{FURTHER_TEMPLATES}/{path.name}" for path in further}
    if os.path.lexists(folder / TEMPLATE):
        files["default"] = TEMPLATE
    try:
        templates = {name: hf.inside(folder, file).read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The chat template in {folder} cannot be read: {error}.") from error
    if not templates and os.path.lexists(folder / TOKENIZER):
        template = hf.read_json(folder, TOKENIZER).get("chat_template")
        try:
            named = [{"name": "default", "template": template}] if isinstance(template, str) else template or ()
            templates = {one["name"]: one["template"] for one in named}
        except (TypeError, KeyError) as error:
            raise UserError(f"The chat_template in {folder / TOKENIZER} is neither text nor a list of them.") from error
    return _template(templates, str(folder))


def of_gguf(metadata: Mapping[str, Any], origin: str) -> Answers:
    """Reads a GGUF file's metadata as llama.cpp does: ends by their keys (`eot`, `eom`) and by their names.

    Raises:
        UserError: a value is of another type.
    """
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    named = [i for i, token in enumerate(metadata.get("tokenizer.ggml.tokens", ())) if token in END_NAMES]
    names = ["default", *metadata.get("tokenizer.chat_templates", ())]
    keys = {name: "tokenizer.chat_template" + f".{name}" * (name != "default") for name in names}
    templates = {name: metadata[key] for name, key in keys.items() if key in metadata}
    return Answers(_ids([i for i in ends if i is not None] + named, origin), _template(templates, origin))


def _ids(value: Any, origin: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{origin} has an eos_token_id {str(value)[:80]} that is neither an id nor a list of them.")
    return tuple(dict.fromkeys(ids))


def _template(templates: Mapping[str, Any], origin: str) -> str | dict[str, str] | None:
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise UserError(f"{origin} has a chat template that is no text; fetch it again.")
    return templates["default"] if templates.keys() == {"default"} else dict(templates) or None
