"""Vocabularies of the T5 family, on top of SeqIO's: SentencePiece `.model` files (T5, mT5) and ByT5's bytes."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio
import tensorflow as tf
from sentencepiece import SentencePieceProcessor

from promot_jax.data.vocabularies.fast import bpe_fields, from_sentencepiece, of_bytes
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary
from promot_jax.errors import UserError


def load(path: str | os.PathLike[str]) -> "SentencePieceVocabulary | TokenizerVocabulary":
    """Reads a `.model` file, local or `gs://`: T5's kind (unigram), or that of Llama and Gemma (BPE, with a BOS).

    Raises:
        UserError: the file is missing, no SentencePiece model, of another kind, or its parts do not fit together.
    """
    processor = _read(os.fspath(path))
    fields = bpe_fields(processor.serialized_model_proto())
    if fields:
        return TokenizerVocabulary.from_gguf(fields)
    vocabulary = SentencePieceVocabulary(path)
    # By this name transformers calls T5's files alone, of which some have a BOS that is never used.
    if processor.bos_id() >= 0 and vocabulary.extra_ids and Path(path).name != "spiece.model":
        raise UserError(
            f"The SentencePiece model {os.fspath(path)!r} has a beginning of sequence, which T5's have not, and is not "
            "BPE as Llama's and Gemma's: give the tokenizer.json of its model."
        )
    return vocabulary


def _read(path: str) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            processor.LoadFromSerializedProto(file.read())
    except tf.errors.OpError as error:
        raise UserError(f"Cannot read the SentencePiece model {path!r}: {error.message}.") from error
    except (RuntimeError, TypeError) as error:
        with tf.io.gfile.GFile(path, "rb") as file:
            ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read(4096))
        mend = " but a tiktoken file; give the tokenizer.json of the same model." if ranks else "; copy it again."
        raise UserError(f"{path!r} is not a SentencePiece model{mend}") from error
    return processor


EXTRA_IDS = 100  # of T5 and mT5
BYTE_CLASS = "ByT5Tokenizer"  # transformers' name


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A SentencePiece model followed by T5's extra ids in T5's order: `<extra_id_0>` is the last id.

    The text "<extra_id_0>" becomes that id in data too, as everywhere in SeqIO; "</s>" stays text. The normaliser of T5
    and mT5 turns any white space into one space, so an output has no line breaks and ends with EOS.
    """

    add_bos = False  # the T5 family has no beginning of sequence
    bos_id: int | None = None
    control_ids: Mapping[str, int] = {}  # no text has control tokens in it

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads a `.model` file, local or `gs://`; appends `EXTRA_IDS` unless its pieces include `<extra_id_0>` (mT5).

        Raises UserError if the file is missing, not a SentencePiece model, or has no end of sequence.
        """
        path = os.fspath(path)
        processor = _read(path)
        if processor.eos_id() < 0:
            raise UserError(f"The SentencePiece model {path!r} names no end of sequence; T5's do.")
        self.sentinels: dict[str, int] = {}
        for i in range(size := processor.GetPieceSize()):
            name = f"<extra_id_{i}>"
            # SeqIO and mT5 write them with the mark of a word's beginning.
            ids = {processor.PieceToId(piece) for piece in (name, f"\u2581{name}")} - {processor.unk_id()}
            if not ids:
                break
            self.sentinels[name] = ids.pop()
        added = 0 if self.sentinels else EXTRA_IDS
        self.sentinels |= {f"<extra_id_{i}>": size + added - 1 - i for i in range(added)}
        super().__init__(path, extra_ids=added)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; drops sentinels and ids beyond the vocabulary."""
        dropped = set(self.sentinels.values())
        return str(super().decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in dropped]))

    def token_strings(self) -> list[str]:
        """Text of each single id, `vocab_size` of them: "" for control tokens and sentinels."""
        texts = list(self.tokenizer.Decode([[i] for i in range(self.vocab_size)]))
        for i in self.sentinels.values():
            texts[i] = ""
        return texts

    def fast(self) -> TokenizerVocabulary:
        """The same tokenizer as a `tokenizers.Tokenizer`; raises UserError if the model cannot be converted."""
        tokenizer_json = from_sentencepiece(self.sp_model).to_str()
        return TokenizerVocabulary(tokenizer_json, eos_id=self.eos_id, pad_id=max(self.pad_id, 0), unk_id=self.unk_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json`, which `vocabularies.load` and transformers' AutoTokenizer read.

        A `spiece.model` would not do: some versions of transformers number the extra ids the other way round.
        """
        self.fast().save(folder)

    def __hash__(self) -> int:
        """Consistent with equality, which is SeqIO's: the same file and extra ids."""
        return hash((self.sentencepiece_model_file, self.extra_ids))

    __eq__ = seqio.SentencePieceVocabulary.__eq__


class ByteVocabulary(seqio.ByteVocabulary):
    """ByT5's bytes: 0 is padding, 1 EOS, 2 unknown, then 256 bytes from 3 on, then unused extra ids.

    ByT5 was trained without extra ids: its sentinels are the last byte ids, counted down from 258 (Xue et al., 2022,
    section 3.1). Named here are those of bytes that no UTF-8 text contains.
    """

    add_bos = False  # the T5 family has no beginning of sequence
    control_ids: Mapping[str, int] = {}

    def __init__(self) -> None:
        """Makes a vocabulary of 384 ids, the rows of published embedding tables."""
        super().__init__(extra_ids=384 - 259)
        self.sentinels = {f"<extra_id_{i}>": 3 + 0xFF - i for i in range(0x100 - 0xF5)}

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; drops bytes that are not UTF-8."""
        return str(super().decode(list(map(int, ids))))

    def token_strings(self) -> list[str]:
        """Text of each single id, `vocab_size` of them: "" for ids that are not a character."""
        return [self._decode([i]) for i in range(self.vocab_size)]

    def fast(self) -> TokenizerVocabulary:
        """The same tokenizer as a `tokenizers.Tokenizer`, in which the extra ids have no names."""
        return TokenizerVocabulary(of_bytes().to_str(), eos_id=self.eos_id, pad_id=self.pad_id, unk_id=self.unk_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the file that `vocabularies.load` and transformers' AutoTokenizer read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": BYTE_CLASS, "extra_ids": self.extra_ids}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __hash__(self) -> int:
        """Consistent with equality, which is SeqIO's: the same extra ids."""
        return hash(self.extra_ids)

    __eq__ = seqio.ByteVocabulary.__eq__
