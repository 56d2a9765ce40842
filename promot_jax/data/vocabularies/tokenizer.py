"""Tokenizers: what training and evaluation need of one, and the `tokenizers.Tokenizer` of a decoder-only model."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from promot_jax.data.vocabularies import controls, gguf
from promot_jax.errors import UserError

SENTINEL = re.compile(r"<extra_id_\d+>")


class Vocabulary(Protocol):
    """What training and evaluation need of a tokenizer. Hashable, since results that depend on it are cached."""

    vocab_size: int  # extra ids included
    eos_id: int  # end of sequence, where `decode` stops
    bos_id: int | None  # beginning of sequence, None if there is none
    pad_id: int  # padding of batches; these carry masks, so it may be a token with another use
    unk_id: int | None  # for ids outside the vocabulary, None if there is none
    add_bos: bool  # whether the model expects `bos_id` at the start of its input

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Ids of the control tokens that a marked text may have (`controls`), by their text; may be empty."""

    @property
    def sentinels(self) -> dict[str, int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ..., which `decode` drops; may be empty."""

    def __hash__(self) -> int:
        """Equal tokenizers have equal hashes."""

    def encode(self, s: Any) -> Sequence[int]:
        """Text to ids, without BOS and EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; drops control tokens, sentinels and ids beyond the vocabulary."""

    def token_strings(self) -> list[str]:
        """Text of each single id, `vocab_size` of them: "" for control tokens and sentinels."""

    def fast(self) -> "TokenizerVocabulary":
        """The same tokenizer as a `tokenizers.Tokenizer`, to which tokens can be added."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `load` and transformers' AutoTokenizer read."""


class TokenizerVocabulary:
    """A `tokenizers.Tokenizer` for text that is data.

    `encode` never makes control tokens: the text "<|im_end|>" becomes the tokens of those ten characters, so that no
    example can end a sequence or open a turn. Of a unigram model, as T5's, `<extra_id_0>` after a space or at the start
    is that sentinel, as in SeqIO. It adds neither BOS nor EOS: the batches do, by `add_bos` and `eos_id`.
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
        """Parses the content of a `tokenizer.json`; `pad_id` defaults to `eos_id`.

        Raises UserError if the JSON is not a tokenizer, or an id lies outside its vocabulary.
        """
        self._tokenizer = _parsed(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Not part of the JSON, whose meaning for other readers must not change.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eos_id, self.bos_id, self.unk_id = eos_id, bos_id, unk_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.add_bos = bool(add_bos)
        for name, value in {"eos": eos_id, "bos": bos_id, "pad": self.pad_id, "unknown": unk_id}.items():
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(f"The {name} id {value} lies outside of a vocabulary of {self.vocab_size} tokens.")
        if add_bos and bos_id is None:
            raise UserError("The tokenizer asks for a beginning-of-sequence token but names none.")
        self._of_data = self._tokenizer
        if self._controls_in_data():
            self._of_data = self._of_chats
        if made := self._controls_in_data():
            raise UserError(f"The tokenizer lets text become the control token {made[0][:40]!r}; remove it there.")

    def _controls_in_data(self) -> list[str]:
        """Control tokens that their own text encodes to."""
        added = self._tokenizer.get_added_tokens_decoder()
        controls = {i: token.content for i, token in added.items() if token.special and i != self.unk_id}
        if self._of_data is not self._tokenizer:
            controls = {i: name for i, name in controls.items() if i not in self.sentinels.values()}
        return [name for name in controls.values() if not controls.keys().isdisjoint(self.encode(name))]

    def within(self, rows: int, origin: str) -> "TokenizerVocabulary":
        """The same tokenizer without its tokens past the `rows` of an embedding table, of the model `origin`.

        They are control tokens that the model was never given, as an added padding token, or an image's in Gemma 3.

        Raises:
            UserError: text can become one of them, or the model needs one.
        """
        data = json.loads(self.tokenizer_json)
        controls = {token["content"] for token in data["added_tokens"] if token["special"]}
        beyond = {token for token, i in self._tokenizer.get_vocab().items() if i >= rows}
        if text := beyond - controls:
            raise UserError(
                f"{origin} has a tokenizer of {self.vocab_size} tokens and {rows} embedding rows, none for "
                f"{min(text)[:40]!r}; take both from the same model."
            )
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < rows]
        vocab = data["model"]["vocab"]
        data["model"]["vocab"] = (
            vocab[:rows] if isinstance(vocab, list) else {k: i for k, i in vocab.items() if i < rows}
        )
        ids = {"eos_id": self.eos_id, "bos_id": self.bos_id, "pad_id": self.pad_id, "unk_id": self.unk_id}
        optional = {name: None for name in ("pad_id", "unk_id") if (ids[name] or 0) >= rows}
        return TokenizerVocabulary(json.dumps(data), add_bos=self.add_bos, **(ids | optional))  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keeps control tokens out of data in copies too: the tokenizer's own copy forgets that setting."""
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "TokenizerVocabulary":
        """Makes the tokenizer of a GGUF file from its metadata (`promot_jax.checkpoints.gguf.load.read_metadata`).

        Raises UserError if the tokenizer's kind is not read, or its parts do not fit together.
        """

        def field(name: str, kind: type, default: Any = None) -> Any:
            value = fields.get(f"tokenizer.ggml.{name}", default)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"The GGUF file's tokenizer.ggml.{name} is a {type(value).__name__}; convert it again.")
            return value

        eos_id = field("eos_token_id", int)
        if eos_id is None:
            raise UserError("The GGUF file names no end-of-sequence token (tokenizer.ggml.eos_token_id).")
        by_kind = gguf.expects_bos(field("model", str), field("pre", str)) and field("bos_token_id", int) is not None
        return cls(
            gguf.build(field).to_str(),
            eos_id=eos_id,
            bos_id=field("bos_token_id", int),
            pad_id=field("padding_token_id", int),
            unk_id=field("unknown_token_id", int),
            add_bos=field("add_bos_token", bool, by_kind),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenizerVocabulary":
        """Reads a Hugging Face folder, or a `tokenizer.json` with a `tokenizer_config.json` beside it.

        Raises UserError if a file is missing or damaged, or names no end of sequence.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        file = folder / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
            tokenizer = Tokenizer.from_str(text)
        except OSError as error:
            raise UserError(f"Cannot read {str(error.filename)!r}: {error.strerror}.") from error
        except Exception as error:  # also what the tokenizers package raises
            raise UserError(f"The tokenizer in {str(folder)!r} is damaged: {str(error)[:200]}.") from error

        config = config if isinstance(config, dict) else {}

        def token_id(role: str) -> int | None:
            token = _content(config.get(f"{role}_token"))
            return None if token is None else tokenizer.token_to_id(token)

        eos_id, bos_id = token_id("eos"), token_id("bos")
        if eos_id is None:
            raise UserError(f"The tokenizer_config.json in {str(folder)!r} names no eos_token of the vocabulary.")
        add_bos = config.get("add_bos_token")
        if add_bos is None:  # in newer folders the post-processor alone shows it
            add_bos = bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id]
        # Some files do not mark these as special: data would make them, and answers keep them.
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        unmarked = (_special_tokens(config) & tokenizer.get_vocab().keys()) | (gguf.CONTROL_NAMES & added.keys())
        unmarked -= {token for token, settings in added.items() if settings.special}
        if unmarked:
            tokenizer.add_special_tokens([_special(token, added.get(token)) for token in sorted(unmarked)])
            text = tokenizer.to_str()
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

    @functools.cached_property
    def sentinels(self) -> dict[str, int]:
        """Ids of T5's `<extra_id_0>`, ..., if the tokenizer has them."""
        return {token: i for token, i in self._tokenizer.get_vocab().items() if SENTINEL.fullmatch(token)}

    @functools.cached_property
    def control_ids(self) -> dict[str, int]:
        """Ids of the control tokens by their text."""
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def encode(self, s: str) -> list[int]:
        """Text to ids, without BOS and EOS. A lone surrogate, which UTF-8 cannot write, becomes "?".

        Marked control tokens (`controls`), as a chat's input has, become their ids.
        """
        tokenizer = self._of_data
        if controls.START in s or controls.BEGIN in s:
            begin = None if self.bos_id is None else self._tokenizer.id_to_token(self.bos_id)
            s = controls.known(s.replace(controls.BEGIN, controls.mark(begin or "")), self.control_ids)
            tokenizer = self._of_chats
        return tokenizer.encode(s.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    @functools.cached_property
    def _of_chats(self) -> Tokenizer:
        """As the tokenizer of data, and reads marked control tokens with the space around them as their own do."""
        return _parsed(_with_marked_controls(self.tokenizer_json))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, up to the first EOS; drops control tokens and ids beyond the vocabulary (soft prompts)."""
        before_eos = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self._tokenizer.decode([i for i in before_eos if 0 <= i < self.vocab_size])

    def token_strings(self) -> list[str]:
        """Text of each single id, `vocab_size` of them: "" for control tokens, "\ufffd" for parts of a character."""
        return self._tokenizer.decode_batch([[i] for i in range(self.vocab_size)])

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        digest = hashlib.sha256(self.tokenizer_json.encode()).hexdigest()
        return digest, self.eos_id, self.bos_id, self.pad_id, self.unk_id, self.add_bos

    def __eq__(self, other: object) -> bool:
        """Same tokenizer, ids and `add_bos`."""
        return isinstance(other, TokenizerVocabulary) and self._identity == other._identity

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self._identity)


def _content(token: Any) -> str | None:
    """The text of a token of a `tokenizer_config.json`, which has it bare or with settings."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special(token: str, like: AddedToken | None) -> AddedToken:
    """A special token that takes the space beside it, or not, as the added token that it was."""
    flags = {} if like is None else {"lstrip": like.lstrip, "rstrip": like.rstrip, "single_word": like.single_word}
    return AddedToken(token, normalized=False, special=True, **flags)


def _special_tokens(config: Mapping[str, Any]) -> set[str]:
    """Tokens that a `tokenizer_config.json` names as special, as transformers takes them; characters of texts are none.

    Some files pad with a character, as "!".
    """
    named = [config.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        named += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        named += [token for token in decoder.values() if isinstance(token, dict) and token.get("special") is True]
    return {text for text in map(_content, named) if text is not None and len(text) > 1}


def _parsed(tokenizer_json: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"Not a readable tokenizer.json: {str(error)[:200]}.") from error


def _with_marked_controls(tokenizer_json: str) -> str:
    """A `tokenizer.json` of the same ids in which only marked text becomes a control token; T5's sentinels as in SeqIO.

    "Marked" is how `controls` marks them. Every control token has its marked text for a name, which no data has.
    """
    data = json.loads(tokenizer_json)
    model, unigram = data["model"], data["model"]["type"] == "Unigram"
    names = {token["content"]: controls.mark(token["content"]) for token in data["added_tokens"] if token["special"]}
    sentinels = {token for token, _ in model["vocab"] if SENTINEL.fullmatch(token)} & names.keys() if unigram else set()
    data["added_tokens"] = [
        {**token, "special": False, "content": names[token["content"]]} if token["special"] else token
        for token in data["added_tokens"]
        if token["content"] not in sentinels
    ]
    if unigram:
        names |= {token: f"\u2581{token}" for token in sentinels}
        # The score of a certain piece: no other pieces for that text score as high.
        model["vocab"] = [(names[token], 0.0) if token in names else (token, score) for token, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    if "merges" in model:
        pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    return json.dumps(data)
