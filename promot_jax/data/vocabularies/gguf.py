"""The tokenizer that a GGUF file describes, as a `tokenizers.Tokenizer`: byte-level BPE, or SentencePiece's BPE.

`TokenizerVocabulary.from_gguf` wraps it. Only control tokens (special) and user-defined tokens are added tokens, and
merges of plain text never make a control token.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import Split

from promot_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # GGUF token types; 5 is unused
_SPACE = "\u2581"  # how SentencePiece writes a space


def _pieces(digits: str) -> Split:
    """Splits text into contractions, words with one sign before, runs of digits, other signs, and line breaks."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return Split(Regex(f"{words}|{digits}|{rest}"), behavior="isolated")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How text is split into pieces, within which BPE merges."""

    cuts: tuple[Any, ...] = ()  # splits applied first
    gpt2: bool = True  # whether GPT-2's own expression then splits further
    nfc: bool = False  # whether characters are composed (Unicode NFC) before
    whole: bool = False  # whether a piece that is a token becomes that token, whatever the merges say
    bos: bool = False  # whether the model expects a beginning of sequence if the file does not say


# By the `tokenizer.ggml.pre` of a GGUF file. "smollm" takes every digit (any Unicode number) apart first, so that
# "\n\n7" is "\n\n", "7" to the model and not "\n", "\n7".
_RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule((pre_tokenizers.Digits(individual_digits=True),)),
    "qwen2": _Rule((_pieces(r"\p{N}"),), gpt2=False, nfc=True),
    "llama-bpe": _Rule((_pieces(r"\p{N}{1,3}"),), gpt2=False, whole=True, bos=True),  # Llama 3
}
# Other names that llama.cpp gives these rules.
_ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2"),
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum"),
}
_RULES |= {alias: _RULES[rule] for rule, aliases in _ALIASES.items() for alias in aliases}

# Names of tokens that end an answer by their name alone: llama.cpp's list (llama-vocab.cpp, `special_eog_ids`) for the
# architectures that are read.
END_NAMES = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>",
}  # fmt: skip
# Names of tokens that are control tokens whatever type a file gives them, as in llama.cpp: these, the ends of other
# architectures, and the parts of texts that are filled in.
CONTROL_NAMES = END_NAMES | {
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "[EOT]", "[EOS]", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
}  # fmt: skip


def expects_bos(kind: str | None, pre: str | None) -> bool:
    """Whether the model of a GGUF file without the (newer) key `add_bos_token` expects a beginning of sequence."""
    return kind == "llama" or (pre in _RULES and _RULES[pre].bos)


def build(field: Callable[..., Any]) -> Tokenizer:
    """Builds the tokenizer; raises UserError if its kind is not read, or its parts do not fit together.

    Prints a warning that names the tokens which the file types as text, and which are read as control tokens.
    `field(name, type, default)` reads `tokenizer.ggml.<name>`, and raises UserError for another type.
    """
    kind = field("model", str)
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"The GGUF file has a tokenizer of type {kind!r}; 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's "
            "BPE) are read: set VOCABULARY to the path of the model's tokenizer.json."
        )
    tokens: list[str] = field("tokens", list, [])
    types: list[int] = field("token_type", np.ndarray, np.empty(0, np.int32)).tolist()
    if kind == "llama":
        # A run of spaces is a token of its own in Gemma; the file writes it with real spaces.
        tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens) or len(types) != len(tokens):
        raise UserError(
            f"The GGUF file has {len(tokens)} tokens, {len(vocab)} distinct, of {len(types)} types; fix it."
        )
    # From the second character on: a token may start with a space, in a user-defined one.
    pairs = [(merge[: (cut := merge.find(" ", 1))], merge[cut + 1 :]) for merge in field("merges", list, [])]
    plain = {left + right for left, right in pairs}
    ends = {field(f"{role}_token_id", int) for role in ("bos", "eos", "eot", "eom")}
    overridden = {
        token
        for token, i in vocab.items()
        if types[i] not in (_UNKNOWN, _CONTROL)
        and (token in CONTROL_NAMES or (types[i] != _BYTE and i in ends and len(token) > 1 and token not in plain))
    }
    for token in overridden:
        types[vocab[token]] = _CONTROL
    if overridden:
        names = ", ".join(sorted(map(repr, overridden)))
        print(f"Warning: the tokenizer has {names} as text; read as control tokens, as llama.cpp does.", flush=True)
    pairs = [(left, right) for left, right in pairs if left + right not in overridden]
    if kind == "gpt2":
        tokenizer = _byte_level(vocab, types, pairs, field("pre", str))
    else:
        scores = field("scores", np.ndarray, np.empty(0, np.float32))
        tokenizer = _sentencepiece(vocab, types, scores, field("add_space_prefix", bool, True))
    control = [token for token, i in vocab.items() if types[i] in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    defined = [token for token, i in vocab.items() if types[i] == _USER_DEFINED]
    if kind == "llama":  # merges make the runs of spaces; an added token would be matched in the wrong spelling
        defined = [token for token in defined if token.strip(_SPACE)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
    return tokenizer


def _byte_level(
    vocab: Mapping[str, int], types: Sequence[int], pairs: Sequence[tuple[str, str]], pre: str | None
) -> Tokenizer:
    if pre not in _RULES:
        raise UserError(
            f"The GGUF file splits text by rule {pre!r}; {', '.join(sorted({'smollm', *_ALIASES}))} are read. Set "
            "VOCABULARY to the path of the model's tokenizer.json."
        )
    controls = {token for token, i in vocab.items() if types[i] in (_UNKNOWN, _CONTROL)}
    for left, right in pairs:
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(f"The GGUF file merges {left[:40]!r} and {right[:40]!r}, not all of which are tokens.")
        if left + right in controls:
            raise UserError(f"The GGUF file lets text become the control token {(left + right)[:40]!r} by a merge.")
    if letters := controls.intersection(pre_tokenizers.ByteLevel.alphabet()):
        raise UserError(f"The GGUF file makes control tokens of plain bytes: {sorted(letters)[:4]}.")
    rule = _RULES[pre]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(pairs), fuse_unk=False, ignore_merges=rule.whole))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rule.cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    for token in controls if rule.whole else ():
        if len(tokenizer.pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise UserError(f"The GGUF file lets text become the control token {token[:40]!r}, which is one word.")
    return tokenizer


def _sentencepiece(vocab: Mapping[str, int], types: Sequence[int], scores: np.ndarray, prefix: bool) -> Tokenizer:
    """SentencePiece's BPE: merges the pair that makes the best-scored piece first; unknown characters become bytes.

    Such a vocabulary has no list of merges. They follow from its scores: any two pieces that together are a piece, in
    the order of its score. User-defined runs of spaces are split off before merging, and their merges come first.
    """
    if len(scores) != len(types) or scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise UserError(f"The GGUF file has {len(types)} tokens but {len(scores)} usable scores; convert it again.")
    byte_tokens = {token for token, i in vocab.items() if types[i] == _BYTE}
    if missing := {f"<0x{byte:02X}>" for byte in range(256)} - byte_tokens:
        raise UserError(f"The GGUF file has no tokens for {len(missing)} of the 256 bytes; convert it again.")
    if letters := [token for token, i in vocab.items() if types[i] in (_UNKNOWN, _CONTROL) and len(token) == 1]:
        raise UserError(f"The GGUF file makes control tokens of plain characters: {letters[:4]}.")

    runs = [token for token, i in vocab.items() if types[i] == _USER_DEFINED and not token.strip(_SPACE)]
    ranks = {token: -float(scores[i]) for token, i in vocab.items() if types[i] == _NORMAL}
    ranks |= dict.fromkeys(runs, -np.inf)
    ranked = [
        (rank, vocab[token], -cut, token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    if runs:
        longest_first = "|".join(sorted(runs, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
