"""Models as Hugging Face folders: stripped, or with the soft prompts as added tokens that any server can be given.

A soft prompt's rows are appended to the embedding table under ids of their own, `<promot_NAME_0>` and so on for the
tokenizer. They must never be generated: the head gets rows of its own for them, each the mean of all real rows. Their
logits are then the mean of the real logits, which is never the maximum, so that greedy decoding and beams pass them by;
sampling is kept off them by `suppress_tokens` in generation_config.json.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from promot_jax import files, trees
from promot_jax.checkpoints.answers import TOKENIZER
from promot_jax.checkpoints.huggingface import config as hf_config
from promot_jax.checkpoints.huggingface import model_card, names, safetensors
from promot_jax.checkpoints.huggingface.generation import GENERATION
from promot_jax.checkpoints.huggingface.load import CONFIG, INDEX, SINGLE
from promot_jax.checkpoints.huggingface.model_card import Card
from promot_jax.checkpoints.huggingface.safetensors import Source
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.errors import UserError
from promot_jax.models import CONFIGS

Prompts = Mapping[str, np.ndarray]

SHARD_BYTES = 5_000_000_000


def write(
    target: Path, base: Pretrained, prompts: Prompts | None = None, dtype: str = "float32", card: Card = Card()
) -> None:
    """Writes a folder that transformers loads with no code of ours; all of it, or nothing.

    Args:
        target: the new folder.
        base: the model and its tokenizer.
        prompts: soft prompts `[length, embed]` by name, as added tokens; None for the model alone.
        dtype: "float32" or "bfloat16", of the file.
        card: where the model comes from, for README.md.

    Raises:
        UserError: the folder is there already, or the model or its tokenizer cannot be said in this format.
    """
    if dtype not in safetensors.DTYPES:
        raise UserError(f"A model is exported as {' or '.join(safetensors.DTYPES)}, not as {dtype!r}.")
    if target.exists():
        raise UserError(f"{target} exists already; delete it, or give another --workdir.")
    with files.replacing(target) as folder:
        folder.mkdir()
        _fill(folder, base, prompts or {}, dtype, card)


def described(base: Pretrained) -> tuple[str, dict[str, Any]]:
    """The model's family, "decoder" or "t5", and its config with all fields."""
    family = next(name for name, kind in CONFIGS.items() if type(base.model.config) is kind)
    return family, hf_config.full(family, base.model.config)


def token_names(prompts: Prompts) -> list[str]:
    """The added tokens, in the order of their ids: prompts by name, each row by row.

    Raises:
        UserError: a name that cannot be part of a token.
    """
    for name in prompts:
        if not re.fullmatch(r"[\w.:+-]+", name):
            raise UserError(f"The prompt {name!r} cannot name tokens; give it letters, digits and _.:+- only.")
    return [f"<promot_{name}_{row}>" for name in sorted(prompts) for row in range(len(prompts[name]))]


def _fill(folder: Path, base: Pretrained, prompts: Prompts, dtype: str, card: Card) -> None:
    family, config = described(base)
    written = hf_config.write(family, config)
    sources = _sources(family, config, base.params)
    vocabulary, tokens = base.vocabulary, token_names(prompts)
    if not hasattr(vocabulary, "save"):
        raise UserError(f"A tokenizer of kind {type(vocabulary).__name__} is not written as Hugging Face files.")
    if tokens:
        vocabulary = vocabulary.fast()
    ends = list(base.end_ids)
    roles: dict[str, Any] = {"bos_token_id": vocabulary.bos_id, "pad_token_id": vocabulary.pad_id}
    roles["eos_token_id"] = ends if len(ends) > 1 else vocabulary.eos_id
    roles |= {"decoder_start_token_id": 0} if family == "t5" else {}
    generation = dict(roles)
    vocabulary.save(folder)
    if template := base.answers.chat_template:
        _put_template(folder / TOKENIZER, template)
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        _put_bos(folder / "tokenizer.json", vocabulary.bos_id)
    if tokens:
        first = config["vocab_size"]
        _add_prompts(sources, family, config, base.params, prompts)
        written |= {"vocab_size": first + len(tokens), "tie_word_embeddings": False}
        generation["suppress_tokens"] = list(range(first, first + len(tokens)))
        between = _extend_tokenizer(folder / "tokenizer.json", first, tokens, vocabulary)
        readme = model_card.prompted(card, family, prompts, first, between, vocabulary)
    else:
        readme = model_card.stripped(card, family, vocabulary)
    model_card.write(folder, readme, card)
    _write_json(folder / CONFIG, written | roles | {"torch_dtype": dtype})
    _write_json(folder / GENERATION, generation)
    _write_tensors(folder, sources, dtype)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(folder: Path, sources: Mapping[str, Source], dtype: str) -> None:
    groups = list(safetensors.shards(sources, dtype, SHARD_BYTES))
    if len(groups) == 1:
        safetensors.write(folder / SINGLE, groups[0], dtype)
        return
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        safetensors.write(folder / shard, group, dtype)
        where |= dict.fromkeys(group, shard)
    size = sum(math.prod(source.shape) for source in sources.values()) * safetensors.size_of(dtype)
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _sources(family: str, config: Mapping[str, Any], params: trees.Tree) -> dict[str, Source]:
    """Every tensor of the model; its values come to the host when they are written."""
    flat = trees.flatten(params)
    sources = {}
    for name in names.table(family, config):
        shape = name.shape[::-1] if name.transposed else name.shape
        for layer in range(names.layers(family, config, name.leaf)) if name.stacked else (None,):
            values = functools.partial(_host, flat[name.leaf], layer, name.transposed)
            sources[name.tensors[0] if layer is None else name.of(layer)] = Source(shape, values)
    return sources


def _host(leaf: Any, layer: int | None, transposed: bool) -> np.ndarray:
    values = np.asarray(leaf if layer is None else leaf[layer])
    return values.T if transposed else values


def _add_prompts(
    sources: dict[str, Source], family: str, config: Mapping[str, Any], params: trees.Tree, prompts: Prompts
) -> None:
    """Appends the prompts' rows to the embedding table, and unties the head."""
    emb = config["emb_dim"]
    rows = np.concatenate([np.asarray(prompts[name], np.float32) for name in sorted(prompts)])
    if rows.shape[1] != emb:
        raise UserError(f"The prompts have rows of {rows.shape[1]}, the model of {emb}.")
    if config.get("embedding_scale"):
        rows = rows / np.float32(math.sqrt(emb))  # what a server multiplies every row with, ours included
    table = names.table(family, config)[0].tensors[0]
    embedding = sources[table]
    head = sources.get("lm_head.weight", embedding)
    # T5 1.0 multiplies the states by this before its shared head, and no model does before a head of its own.
    scale = np.float32(emb**-0.5 if family == "t5" and config["tied_embeddings"] else 1)

    def untied() -> np.ndarray:
        real = head.values().astype(np.float32) * scale
        mean = real.mean(axis=0, dtype=np.float64).astype(np.float32)
        return np.concatenate([real, np.broadcast_to(mean, rows.shape)])

    shape = (config["vocab_size"] + len(rows), emb)
    sources[table] = Source(shape, lambda: np.concatenate([embedding.values(), rows]))
    sources["lm_head.weight"] = Source(shape, untied)


def _put_template(file: Path, template: str | Mapping[str, str]) -> None:
    """Adds a chat template where every version of transformers reads it, or several by name."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(template, str):
        config["chat_template"] = template
    else:
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    _write_json(file, config)


def _put_bos(file: Path, bos_id: int) -> None:
    """Has the tokenizer itself start every input with the token; a flag in its config alone is not heeded."""
    tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    if tokenizer.encode("").ids[:1] == [bos_id]:
        return
    token = str(tokenizer.id_to_token(bos_id))
    start = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, bos_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = start if before is None else processors.Sequence([before, start])
    file.write_text(tokenizer.to_str(), encoding="utf-8")


def _extend_tokenizer(file: Path, first: int, tokens: list[str], vocabulary: Any) -> str | None:
    """Gives the tokenizer the tokens, from id `first` on.

    Returns:
        What has to stand between them and a text so that it is read as it is alone, None where nothing does it.
    """
    tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    known = tokenizer.get_vocab()
    if taken := known.keys() & set(tokens):
        raise UserError(f"The tokenizer has a token {min(taken)!r} already; give the prompt another name.")
    # Ids are given out in order. Rows of the table beyond the tokenizer's tokens get names, so that ours come last.
    unused = range(max(known.values()) + 1, first)
    tokenizer.add_tokens([AddedToken(f"<promot_unused_{i}>", normalized=False) for i in unused])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    for i, token in enumerate(tokens, first):
        if tokenizer.token_to_id(token) != i:
            raise UserError(f"The tokenizer would give {token} the id {tokenizer.token_to_id(token)} instead of {i}.")
    file.write_text(tokenizer.to_str(), encoding="utf-8")
    sample = "A text: of words, 12 and 345.\nAnd a second line"
    alone = tokenizer.encode(sample, add_special_tokens=False).ids
    start = [] if not vocabulary.add_bos else [vocabulary.bos_id]
    front = "".join(tokens) + "".join(str(tokenizer.id_to_token(i)) for i in start)
    want = [*range(first, first + len(tokens)), *start, *alone]
    for between in ("", " "):  # SentencePiece marks the beginning of the first word, or that after a space
        if tokenizer.encode(front + between + sample, add_special_tokens=False).ids == want:
            return between
    return None
