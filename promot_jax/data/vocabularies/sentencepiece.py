"""Vocabularies of the T5 family, on top of SeqIO's: SentencePiece `.model` files (T5, mT5) and ByT5's bytes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import seqio
import tensorflow as tf
from sentencepiece import SentencePieceProcessor

from promot_jax.data.vocabularies.fast import from_sentencepiece, of_bytes
from promot_jax.errors import UserError

if TYPE_CHECKING:
    from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary

EXTRA_IDS = 100  # of T5 and mT5
BYTE_CLASS = "ByT5Tokenizer"  # as transformers calls it


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A SentencePiece model with T5's extra ids behind its pieces, in T5's order: `<extra_id_0>` is the last id.

    The text "<extra_id_0>" becomes that id in data too, as everywhere in SeqIO; "</s>" stays text. The normaliser of T5
    and mT5 makes one space of any white space, so that an output never holds a line's end: EOS ends it.

    Attributes:
        add_bos: False, the T5 family has no beginning of sequence.
        sentinels: `{"<extra_id_0>": id, ...}`.
    """

    add_bos = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads a model; `EXTRA_IDS` are added behind its pieces, unless they hold `<extra_id_0>` as mT5's do.

        Args:
            path: the `.model` file, local or `gs://`.

        Raises:
            UserError: no such file, not a SentencePiece model, or one without an end of sequence.
        """
        processor = SentencePieceProcessor()
        try:
            with tf.io.gfile.GFile(os.fspath(path), "rb") as file:
                processor.LoadFromSerializedProto(file.read())
        except tf.errors.OpError as error:
            raise UserError(f"Cannot read the SentencePiece model {os.fspath(path)!r}: {error.message}.") from error
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{os.fspath(path)!r} is not a SentencePiece model; copy it again.") from error
        if processor.eos_id() < 0:
            raise UserError(f"The SentencePiece model {os.fspath(path)!r} names no end of sequence; T5's do.")
        names = (f"<extra_id_{i}>" for i in range(processor.GetPieceSize()))
        self.sentinels: dict[str, int] = {}
        for name in names:
            # With the mark of a word's beginning where SeqIO, or mT5, wrote them.
            found = {processor.PieceToId(piece) for piece in (name, f"\u2581{name}")} - {processor.unk_id()}
            if not found:
                break
            self.sentinels[name] = found.pop()
        added = 0 if self.sentinels else EXTRA_IDS
        size = processor.GetPieceSize() + added
        self.sentinels = self.sentinels or {f"<extra_id_{i}>": size - 1 - i for i in range(added)}
        super().__init__(os.fspath(path), extra_ids=added)

    @property
    def bos_id(self) -> None:
        """None: the T5 family has no beginning of sequence."""
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; sentinels and ids beyond the vocabulary are dropped."""
        dropped = set(self.sentinels.values())
        return str(super().decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in dropped]))

    def token_strings(self) -> list[str]:
        """Text of each id by itself, `vocab_size` of them: "" for control tokens and sentinels."""
        texts = list(self.tokenizer.Decode([[i] for i in range(self.vocab_size)]))
        for i in self.sentinels.values():
            texts[i] = ""
        return texts

    def fast(self) -> "TokenizerVocabulary":
        """The same as a `tokenizers` tokenizer.

        Raises:
            UserError: the model is of a kind that is not converted.
        """
        from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary  # which imports this module

        made = from_sentencepiece(self.sp_model).to_str()
        return TokenizerVocabulary(made, eos_id=self.eos_id, pad_id=max(self.pad_id, 0), unk_id=self.unk_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `vocabularies.load` and transformers' AutoTokenizer read: `tokenizer.json`.

        A `spiece.model` would not do: some versions of transformers number the extra ids the other way round.
        """
        self.fast().save(folder)

    def __hash__(self) -> int:
        """Consistent with equality, which is SeqIO's: the same file and extra ids."""
        return hash((self.sentencepiece_model_file, self.extra_ids))

    __eq__ = seqio.SentencePieceVocabulary.__eq__


class ByteVocabulary(seqio.ByteVocabulary):
    """ByT5's bytes: 0 is padding, 1 EOS, 2 unknown, bytes follow from 3, and extra ids behind them fill the table.

    ByT5 was trained without extra ids: its sentinels are the last byte ids, counted down from 258 (Xue et al., 2022,
    section 3.1). Named here are those of bytes that no UTF-8 text contains.

    Attributes:
        add_bos: False, the T5 family has no beginning of sequence.
        sentinels: `{"<extra_id_0>": 258, ...}`.
    """

    add_bos = False

    def __init__(self) -> None:
        """Makes a vocabulary of 384 ids, the rows of published tables."""
        super().__init__(extra_ids=384 - 259)
        self.sentinels = {f"<extra_id_{i}>": 3 + 0xFF - i for i in range(0x100 - 0xF5)}

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; whatever is no UTF-8 is dropped."""
        return str(super().decode(list(map(int, ids))))

    def token_strings(self) -> list[str]:
        """Text of each id by itself, `vocab_size` of them: "" for all that is no text alone."""
        return [self._decode([i]) for i in range(self.vocab_size)]

    def fast(self) -> "TokenizerVocabulary":
        """The same as a `tokenizers` tokenizer; extra ids have no names there."""
        from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary  # which imports this module

        made = of_bytes().to_str()
        return TokenizerVocabulary(made, eos_id=self.eos_id, pad_id=self.pad_id, unk_id=self.unk_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the file that `vocabularies.load` and transformers' AutoTokenizer read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": BYTE_CLASS, "extra_ids": self.extra_ids}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __hash__(self) -> int:
        """Consistent with equality, which is SeqIO's: the same extra ids."""
        return hash(self.extra_ids)

    __eq__ = seqio.ByteVocabulary.__eq__
