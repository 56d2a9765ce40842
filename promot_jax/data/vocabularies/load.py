"""Loads a tokenizer from a file or folder, or ByT5's bytes."""

import codecs
import json
import os
from pathlib import Path

from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary, Vocabulary
from promot_jax.errors import UserError


def load(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a tokenizer.

    Args:
        path: a folder with `tokenizer.json`, `spiece.model`, `tokenizer.model` or ByT5's `tokenizer_config.json`; a
            `tokenizer.json`; a SentencePiece model, local or `gs://` (then called `.model`); or "bytes" for ByT5's.

    Raises:
        UserError: there is no tokenizer, or it is damaged.
    """
    folder = Path(path)
    is_t5s = str(path) == "bytes" or _is_sentencepiece(path)
    if not is_t5s and ((folder / "tokenizer.json").is_file() or not folder.is_dir()):
        return TokenizerVocabulary.load(path)
    from promot_jax.data.vocabularies import sentencepiece  # imports TensorFlow, which takes seconds

    if is_t5s:
        return sentencepiece.ByteVocabulary() if str(path) == "bytes" else sentencepiece.load(path)
    for name in ("spiece.model", "tokenizer.model"):
        if (folder / name).is_file():
            return sentencepiece.load(folder / name)
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and config.get("tokenizer_class") == sentencepiece.BYTE_CLASS:
        return sentencepiece.ByteVocabulary()
    raise UserError(f"{folder} holds no tokenizer (tokenizer.json, spiece.model or tokenizer.model); copy it there.")


def _is_sentencepiece(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a SentencePiece model and no JSON, by its content; by its name where it is remote.

    A file called `.json` counts as JSON, damaged or not, unless it has zero bytes, as a model's first scores have.
    """
    if not Path(path).is_file():
        return str(path).endswith(".model")
    with Path(path).open("rb") as file:
        start = file.read(64)
    is_json = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    return not is_json and (Path(path).suffix != ".json" or b"\0" in start)


def within(vocabulary: Vocabulary, rows: int, origin: str) -> Vocabulary:
    """A tokenizer without its tokens past the `rows` of the embedding table of a model `origin`; see its method.

    Raises:
        UserError: text can become one of them.
    """
    if vocabulary.vocab_size <= rows:
        return vocabulary
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.within(rows, origin)
    raise UserError(
        f"{origin} has a tokenizer of {vocabulary.vocab_size} tokens and {rows} embedding rows; take both from the "
        "same model."
    )
