"""T5's tokenizers as `tokenizers.Tokenizer`, which transformers and servers read: SentencePiece unigram models, bytes.

Their ids equal SeqIO's. With special tokens they end a text with `</s>`, as T5's do.
"""

import re
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from promot_jax.errors import UserError

_SPACE = "\u2581"  # SentencePiece's mark of a word's beginning
_UNIGRAM, _BPE, _UNKNOWN, _CONTROL = 1, 2, 2, 3  # SentencePiece's numbers for kinds of models and of pieces


def from_sentencepiece(model: bytes) -> Tokenizer:
    """Converts a serialized SentencePiece unigram model; its pieces `<extra_id_...>` become special tokens.

    Raises UserError if the model is of another kind, or normalises text in a way that is not converted.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    normal = proto.normalizer_spec
    if proto.trainer_spec.model_type != _UNIGRAM or not normal.escape_whitespaces:
        raise UserError("The SentencePiece model is not a unigram model as T5's are: it has no tokenizer.json.")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("The SentencePiece model marks the ends of words, not their beginnings: no tokenizer.json.")
    pieces, special = [], []
    for piece in proto.pieces:
        name = piece.piece.removeprefix(_SPACE)
        sentinel = re.fullmatch(r"<extra_id_\d+>", name)
        pieces.append((name if sentinel else piece.piece, piece.score))
        if sentinel or piece.type in (_UNKNOWN, _CONTROL):
            # The space before a sentinel is the mark of its own piece.
            special.append(AddedToken(pieces[-1][0], lstrip=bool(sentinel), normalized=False, special=True))
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback))
    steps: list[normalizers.Normalizer] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(" $"), "")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    start = "first" if normal.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=start, split=False)
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme=start, split=False)
    tokenizer.add_special_tokens(special)
    return _ended(tokenizer, proto.trainer_spec.eos_piece)


def bpe_fields(model: bytes) -> dict[str, Any]:
    """What a GGUF file says of a serialized SentencePiece model of the kind BPE, as Llama's and Gemma's; {} of others.

    Raises UserError if it normalises text, which those do not.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at import
    normal, trained = proto.normalizer_spec, proto.trainer_spec
    if trained.model_type != _BPE:
        return {}
    trimmed = normal.remove_extra_whitespaces or trained.treat_whitespace_as_suffix
    if normal.precompiled_charsmap or trimmed or not normal.escape_whitespaces:
        raise UserError("The SentencePiece model normalises text, unlike Llama's and Gemma's; give a tokenizer.json.")
    ids = {"bos": trained.bos_id, "eos": trained.eos_id, "unknown": trained.unk_id, "padding": trained.pad_id}
    fields = {f"{role}_token_id": i for role, i in ids.items() if i >= 0} | {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": np.array([piece.score for piece in proto.pieces], np.float32),
        "token_type": np.array([piece.type for piece in proto.pieces], np.int32),
        "add_space_prefix": normal.add_dummy_prefix,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def of_bytes() -> Tokenizer:
    """Makes ByT5's byte tokenizer; the unused ids after the bytes have no names."""
    names = ["<pad>", "</s>", "<unk>"]
    # The character that stands for each byte in byte-level vocabularies: itself if it is printable.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unused = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(unused)) for byte in range(0x100)]
    vocab = {name: i for i, name in enumerate([*names, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return _ended(tokenizer, "</s>")


def _ended(tokenizer: Tokenizer, eos: str) -> Tokenizer:
    """Makes a tokenizer append the end of sequence."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return tokenizer
