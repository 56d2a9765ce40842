"""SeqIO vocabulary over a `tokenizers.Tokenizer`: that of a decoder-only model, from GGUF or tokenizer.json."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import seqio
import tensorflow as tf
from tokenizers import Tokenizer

from promot_jax.data.vocabularies import gguf
from promot_jax.errors import UserError


class Vocabulary(Protocol):
    """What training and evaluation ask of a tokenizer."""

    def __hash__(self) -> int:
        """Consistent with equality: examples are encoded once per vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Tokens, extra ids included."""

    @property
    def eos_id(self) -> int:
        """End of sequence, where `decode` stops."""

    @property
    def bos_id(self) -> int | None:
        """Beginning of sequence, if there is one."""

    @property
    def pad_id(self) -> int:
        """Fills batches up."""

    @property
    def add_bos(self) -> bool:
        """Whether the model expects `bos_id` in front of its input."""

    @property
    def sentinels(self) -> dict[str, int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ..., which `decode` drops; empty where there are none."""

    def encode(self, s: Any) -> Sequence[int]:
        """Text to ids, with neither beginning nor end of sequence."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; control tokens, sentinels and ids beyond the vocabulary are dropped."""

    def token_strings(self) -> list[str]:
        """Text of each id by itself, "" for control tokens and sentinels."""

    def fast(self) -> "TokenizerVocabulary":
        """The same as a `tokenizers` tokenizer, which can take further tokens."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `load` and transformers' AutoTokenizer read."""


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer as SeqIO sees it.

    `encode` treats its input as data: the text "<|im_end|>" becomes the tokens of those ten characters, never the
    control token, so that no example can end a sequence or open a turn. It adds no beginning or end of sequence: the
    batches do, by `add_bos` and `eos_id`. `decode` drops control tokens, and ids beyond the vocabulary, such as those
    of a soft prompt.

    Attributes:
        add_bos: whether the model expects `bos_id` in front of its input.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        eos_id: int,
        bos_id: int | None = None,
        pad_id: int | None = None,
        unk_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        """Makes a vocabulary.

        Args:
            tokenizer_json: content of a `tokenizer.json`.
            eos_id: end of sequence, where `decode` stops.
            bos_id: beginning of sequence, if there is one.
            pad_id: filler of batches, `eos_id` when not given. Batches carry masks, so it may be a token with a use.
            unk_id: token for ids outside the vocabulary, if there is one.
            add_bos: whether the model expects `bos_id` in front of its input.

        Raises:
            UserError: the JSON is not a tokenizer, or an id lies outside of its vocabulary.
        """
        super().__init__()
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"Not a readable tokenizer.json: {str(error)[:200]}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Not part of the JSON, which must keep its meaning for other readers; set again on every construction.
        self._tokenizer.encode_special_tokens = True
        self._size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._eos_id, self._bos_id, self._unk_id = eos_id, bos_id, unk_id
        self._pad_id = eos_id if pad_id is None else pad_id
        self.add_bos = bool(add_bos)
        for name, value in {"eos": eos_id, "bos": bos_id, "pad": self._pad_id, "unknown": unk_id}.items():
            if value is not None and not 0 <= value < self._size:
                raise UserError(f"The {name} id {value} lies outside of a vocabulary of {self._size} tokens.")
        if add_bos and bos_id is None:
            raise UserError("The tokenizer asks for a beginning-of-sequence token but names none.")

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "TokenizerVocabulary":
        """Makes the tokenizer of a GGUF file.

        Args:
            fields: the file's metadata, from `promot_jax.checkpoints.gguf.load.read` or `read_metadata`.

        Raises:
            UserError: the tokenizer is of a kind that is not read, or its parts do not fit together.
        """

        def field(name: str, kind: type, default: Any = None) -> Any:
            value = fields.get(f"tokenizer.ggml.{name}", default)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"The GGUF file's tokenizer.ggml.{name} is a {type(value).__name__}; convert it again.")
            return value

        eos_id = field("eos_token_id", int)
        if eos_id is None:
            raise UserError("The GGUF file names no end-of-sequence token (tokenizer.ggml.eos_token_id).")
        by_kind = gguf.expects_bos(field("model", str), field("pre", str))
        return cls(
            gguf.build(field).to_str(),
            eos_id=eos_id,
            bos_id=field("bos_token_id", int),
            pad_id=field("padding_token_id", int),
            unk_id=field("unknown_token_id", int),
            add_bos=field("add_bos_token", bool, by_kind and field("bos_token_id", int) is not None),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenizerVocabulary":
        """Reads what `save` wrote, or the tokenizer of a Hugging Face model folder.

        Args:
            path: a folder with `tokenizer.json` and `tokenizer_config.json`, or the former's path.

        Raises:
            UserError: a file is missing or damaged, or names no end of sequence.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        file = folder / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            text = file.read_text(encoding="utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_str(text)
        except OSError as error:
            raise UserError(f"Cannot read {str(error.filename)!r}: {error.strerror}.") from error
        except Exception as error:  # also what the tokenizers package raises
            raise UserError(f"The tokenizer in {str(folder)!r} is damaged: {str(error)[:200]}.") from error

        def token_id(role: str) -> int | None:
            token = config.get(f"{role}_token") if isinstance(config, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            return tokenizer.token_to_id(token) if isinstance(token, str) else None

        eos_id, bos_id = token_id("eos"), token_id("bos")
        if eos_id is None:
            raise UserError(f"The tokenizer_config.json in {str(folder)!r} names no eos_token of the vocabulary.")
        add_bos = config.get("add_bos_token")
        if add_bos is None:  # newer folders say it by their post-processor only
            add_bos = bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id]
        return cls(
            text, eos_id=eos_id, bos_id=bos_id, pad_id=token_id("pad"), unk_id=token_id("unk"), add_bos=bool(add_bos)
        )

    def fast(self) -> "TokenizerVocabulary":
        """Itself."""
        return self

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and transformers' AutoTokenizer read."""
        tokens = {"eos": self.eos_id, "bos": self.bos_id, "pad": self.pad_id, "unk": self.unk_id}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        } | {f"{role}_token": self._tokenizer.id_to_token(i) for role, i in tokens.items() if i is not None}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def tokenizer_json(self) -> str:
        """Content of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of sequence, None when there is none."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """Id of the end of sequence."""
        return self._eos_id

    @property
    def pad_id(self) -> int:
        """Id that fills batches up."""
        return self._pad_id

    @property
    def unk_id(self) -> int | None:
        """Id for what the vocabulary cannot say, None when there is none."""
        return self._unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(_text(s), add_special_tokens=False).ids

    @functools.cached_property
    def sentinels(self) -> dict[str, int]:
        """Ids of T5's `<extra_id_0>`, ..., where the tokenizer has them."""
        return {token: i for token, i in self._tokenizer.get_vocab().items() if re.fullmatch(r"<extra_id_\d+>", token)}

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self._size], skip_special_tokens=True)

    def token_strings(self) -> list[str]:
        """Text of each id by itself, `vocab_size` of them: "" for control tokens, "\ufffd" for parts of a character."""
        return [self._decode([i]) for i in range(self._size)]

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Scalar string -> int32 [length]; strings of any other static rank -> ragged, one axis more."""
        s = tf.convert_to_tensor(s)

        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = [self._encode(text) for text in np.ravel(texts)]
            flat = [i for row in rows for i in row]
            return np.array(flat, np.int32), np.array([len(row) for row in rows], np.int64)

        values, lengths = tf.numpy_function(encode, [s], (tf.int32, tf.int64), stateful=False)
        values, lengths = tf.ensure_shape(values, [None]), tf.ensure_shape(lengths, [None])
        if s.shape.rank == 0:
            return values
        ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
        for axis in range(s.shape.rank - 1, 0, -1):
            ragged = tf.RaggedTensor.from_uniform_row_length(ragged, tf.shape(s, tf.int64)[axis])
        return ragged

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Integers [..., length] -> strings [...]."""
        ids = tf.convert_to_tensor(ids)

        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1]) if rows.size else np.empty((int(np.prod(rows.shape[:-1])), 0), int)
            return np.array([self._decode(row).encode() for row in flat], object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), ids.shape[:-1])

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        digest = hashlib.sha256(self.tokenizer_json.encode()).hexdigest()
        return digest, self._eos_id, self._bos_id, self._pad_id, self._unk_id, self.add_bos

    def __eq__(self, other: object) -> bool:
        """Same tokenizer, ids and `add_bos`: SeqIO asks this of the features of a mixture."""
        return isinstance(other, TokenizerVocabulary) and self._identity == other._identity

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self._identity)

    def __str__(self) -> str:
        """Size and digest."""
        return f"TokenizerVocabulary(size={self._size}, sha256={self._identity[0][:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is constructed anew: the tokenizer's own copy would read control tokens in data."""
        make = functools.partial(
            TokenizerVocabulary,
            eos_id=self._eos_id,
            bos_id=self._bos_id,
            pad_id=self._pad_id,
            unk_id=self._unk_id,
            add_bos=self.add_bos,
        )
        return make, (self.tokenizer_json,)


def _text(s: str | bytes) -> str:
    """Python or TensorFlow text; what UTF-8 cannot say (lone surrogates, broken bytes) is replaced, not an error."""
    return s.decode("utf-8", "replace") if isinstance(s, bytes) else s.encode("utf-8", "replace").decode("utf-8")
