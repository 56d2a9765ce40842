"""README.md of exported folders: a model card, with code that runs to the generated text."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_AUTO = {"t5": "AutoModelForSeq2SeqLM", "decoder": "AutoModelForCausalLM"}
_EXAMPLE = "Country: Italy\nCapital: Rome\n\nCountry: France\nCapital:"
# The end of the README.md of a model.
_CONTROL_TOKENS = """
In training and evaluation a text that has the name of a control token in it (`<|im_end|>`, `</s>`) was text. Without
a further argument this tokenizer reads it as that token, so that data could end a sequence or open a turn; it reads
text as text by `tokenizer(text, split_special_tokens=True)`.
"""
_PIECES = """
In training and evaluation a text that has the name of a control token in it (`</s>`, `<pad>`) was text. This tokenizer
reads it as that token, with `split_special_tokens=True` too, since the names are pieces of its model: data could end a
sequence. Take such names out of data, or write a space after their `<`.
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says of a model's origin; fields that are empty are left out."""

    base_model: str = ""  # path or address of the base model
    license: str = ""  # of the base model, where it is known
    method: str = ""  # label of the method that trained the model or the prompt
    task: str = ""  # SeqIO task or mixture that it was trained on
    scores: tuple[tuple[str, str], ...] = ()  # what was measured, and the score
    config: str = ""  # content of the gin file of the run that measured them
    example: str = _EXAMPLE  # input that the code generates for
    hub: str = ""  # "org/name" where the export is pushed to


CONFIG_FILE = "run.gin"  # beside README.md, with `Card.config`


def stripped(card: Card, family: str, vocabulary: Any) -> str:
    """README.md of the model without soft prompts; `family` is "decoder" or "t5"."""
    how = f"""# A model without soft prompts

{_code(family, card)}

generation_config.json has the tokens that end an answer, tokenizer_config.json the chat template where there is one.
"""
    return _front_matter(card, "transformers", card.hub) + how + _origin(card) + _data_note(vocabulary)


def prompted(
    card: Card, family: str, prompts: Mapping[str, Any], first: int, between: str | None, vocabulary: Any
) -> str:
    """README.md of a model with its soft prompts as added tokens.

    Args:
        card: where the model comes from.
        family: "decoder" or "t5".
        prompts: soft prompts `[length, embed]` by name.
        first: id of the first added token.
        between: what has to stand between the tokens and a text in one string; None where nothing does it.
        vocabulary: tokenizer of the model.
    """
    name, rows, last = min(prompts), "", first - 1
    for key in sorted(prompts):
        start, last = last + 1, last + len(prompts[key])
        rows += f"| {key} | `<promot_{key}_0>` to `<promot_{key}_{last - start}>` | {start} to {last} |\n"
    one_string = ""
    if between is not None:
        bos = (" + tokenizer.bos_token" if vocabulary.add_bos else "") + (f' + "{between}"' if between else "")
        one_string = f"""
A server that takes text only (vLLM and the like) reads the same ids from one string:
`tokenizer("".join(prompt){bos} + text{"" if family == "t5" else ", add_special_tokens=False"})`.
"""
    how = f"""# A model with its soft prompts as tokens

| task | tokens | ids |
|---|---|---|
{rows}
For a task of the table, put all of its tokens, in order, in front of the input; for anything else leave them
out: the model is then the plain one. Nothing may stand before them, a beginning-of-sequence token included.

{_code(family, card, tokens=(name, len(prompts[name])))}

Without the soft prompt: `ids = tokenizer(text).input_ids`.
{one_string}
These tokens are never generated: their rows of the output head are the mean of all others, so that greedy
decoding and beams cannot choose them, and `suppress_tokens` in generation_config.json forbids them when
sampling. A server that does not read that file wants the ids in its own list of forbidden tokens.
"""
    return _front_matter(card, "transformers", card.hub) + how + _origin(card) + _data_note(vocabulary)


def adapter(card: Card, family: str, base: str, title: str, path: str = "") -> str:
    """README.md of an adapter in PEFT's format.

    Args:
        card: where the adapter comes from.
        family: "decoder" or "t5".
        base: path or address of the model that it is loaded on.
        title: what it is.
        path: of the adapter's folder in the repository `Card.hub`.
    """
    how = f"""# {title}, for PEFT

{_code(family, card, base=base, subfolder=path)}

Without the adapter the model is the plain one. `use_cache=False` matters for soft prompts: with a cache, PEFT 0.21
with transformers 5 generates other tokens after a soft prompt than its own logits say.
"""
    return _front_matter(card, "peft", base) + how + _origin(card)


def write(folder: Path, readme: str, card: Card) -> None:
    """Writes README.md and, where the card has one, the gin file of the run beside it."""
    (folder / "README.md").write_text(readme, encoding="utf-8")
    if card.config:
        (folder / CONFIG_FILE).write_text(card.config, encoding="utf-8")


def _data_note(vocabulary: Any) -> str:
    """How this tokenizer, as transformers reads it, reads the names of control tokens in data."""
    model = json.loads(vocabulary.fast().tokenizer_json)["model"]
    return _PIECES if model["type"] == "Unigram" else _CONTROL_TOKENS


def _code(
    family: str, card: Card, *, tokens: tuple[str, int] | None = None, base: str = "", subfolder: str = ""
) -> str:
    """Python that prints what is generated for `Card.example`; run in the folder, or anywhere from the hub."""
    auto, here, where = _AUTO[family], card.hub or ".", ""
    if card.hub and (subfolder or tokens):
        where = f', subfolder="{subfolder or "with_prompts"}"'
    model = f'"{base}"' if base else f'"{here}"{where}'
    lines = ["import torch", *(["from peft import PeftModel"] if base else [])]
    lines += [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"text = {json.dumps(card.example, ensure_ascii=False)}",
    ]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({model})", f"model = {auto}.from_pretrained({model})"]
    if base:
        lines.append(f'model = PeftModel.from_pretrained(model, "{here}"{where})')
    ids = "tokenizer(text).input_ids"
    if tokens:
        lines.append(f'prompt = [f"<promot_{tokens[0]}_{{i}}>" for i in range({tokens[1]})]')
        ids = f"tokenizer.convert_tokens_to_ids(prompt) + {ids}"
    lines.append(f"ids = torch.tensor([{ids}])")
    options = "attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False"
    lines.append(f"output = model.generate(input_ids=ids, {options}{', use_cache=False' if base else ''})[0]")
    answer = "output" if family == "t5" else "output[ids.shape[1] :]"
    lines.append(f"print(tokenizer.decode({answer}, skip_special_tokens=True))")
    return "\n".join(["```python", *lines, "```"])


def _front_matter(card: Card, library: str, base: str) -> str:
    """The YAML in front of a model card; JSON's strings and lists are YAML's."""
    entries: dict[str, Any] = {}
    base_model = base if library == "peft" else card.base_model.removeprefix("hf://")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base_model, re.ASCII):  # an address on the hub
        entries["base_model"] = base_model
    if card.license:
        known = re.fullmatch(r"[A-Za-z]+(-[\w.]+)*", card.license)
        entries |= {"license": card.license.lower()} if known else {"license": "other", "license_name": card.license}
    tags = ["promot", *(["prompt-tuning"] if card.method else []), *([card.method] if card.method else [])]
    entries |= {"library_name": library, "tags": list(dict.fromkeys(tags))}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in entries.items()), "---", ""])


def _origin(card: Card) -> str:
    """Base model, method, task and scores."""
    facts = {"Base model": card.base_model, "License of the base model": card.license, "Method": card.method}
    facts["Fine-tuned task"] = card.task
    text = "".join(f"- {name}: {value}\n" for name, value in facts.items() if value)
    text = f"\n## Where it comes from\n\n{text}" if text else ""
    if card.scores:
        rows = "".join(f"| {name} | {score} |\n" for name, score in card.scores)
        text += f"\n| on the test split | score |\n|---|---|\n{rows}"
        text += "\nThe target score is measured with the soft prompt where the method has one, ICL without it.\n"
    if card.config:
        command = f"python -m promot_jax.main --gin_file={CONFIG_FILE}"
        text += f"\n`{command}` trains and measures it, with the `{CONFIG_FILE}` that lies here.\n"
    return text
