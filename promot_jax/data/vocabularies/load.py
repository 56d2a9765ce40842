"""Loads a tokenizer from a file or folder, or ByT5's bytes."""

import json
import os
from pathlib import Path

from promot_jax.data.vocabularies import sentencepiece
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary, Vocabulary
from promot_jax.errors import UserError


def load(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a tokenizer.

    Args:
        path: a folder with `tokenizer.json`, `spiece.model` or ByT5's `tokenizer_config.json`; a `tokenizer.json`; a
            SentencePiece `.model` file, local or `gs://`; or "bytes" for ByT5's.

    Raises:
        UserError: there is no tokenizer, or it is damaged.
    """
    folder = Path(path)
    if str(path) == "bytes":
        return sentencepiece.ByteVocabulary()
    if str(path).endswith(".model"):
        return sentencepiece.SentencePieceVocabulary(path)
    if (folder / "tokenizer.json").is_file() or not folder.is_dir():
        return TokenizerVocabulary.load(path)
    if (folder / "spiece.model").is_file():
        return sentencepiece.SentencePieceVocabulary(folder / "spiece.model")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and config.get("tokenizer_class") == sentencepiece.BYTE_CLASS:
        return sentencepiece.ByteVocabulary()
    raise UserError(f"{folder} holds no tokenizer (tokenizer.json or spiece.model); copy it there.")
