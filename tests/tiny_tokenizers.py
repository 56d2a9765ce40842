"""SentencePiece's BPE, as the tokenizers of Llama and Gemma are, trained on two short texts."""

import io
from typing import Any

import numpy as np
import pytest

CORPUS = (
    "In 2026 the cat, the café's cat, isn't on 12345 mats.\n\nQuestion:  where?\tAnswer: nowhere at all; there, there.",
    "def f(x):\n    return x + 1\n\n\n    # ни кошки, ни 猫\n",
)
NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6
RUNS = ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "\t"]  # user-defined, as Gemma's are


def train(prefix: bool) -> tuple[Any, dict[str, Any]]:
    """A SentencePiece model with byte fallback like Gemma's (or, with a space put in front, Llama 2's), and the
    metadata that a GGUF file of it has."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line] * 20),
        model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True, add_dummy_prefix=prefix,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=[] if prefix else RUNS,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(oracle.get_piece_size())
    pieces = [oracle.id_to_piece(i) for i in ids]
    controls = [CONTROL if oracle.is_control(i) else UNKNOWN if oracle.is_unknown(i) else NORMAL for i in ids]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        # Converters write runs of spaces as spaces.
        "tokenizer.ggml.tokens": [p.replace("▁", " ") if len(p) > 1 and not p.strip("▁") else p for p in pieces],
        "tokenizer.ggml.scores": np.array([oracle.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(
            [BYTE if oracle.is_byte(i) else kind for i, kind in zip(ids, controls, strict=True)], np.int32
        ),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    for piece in () if prefix else RUNS:
        fields["tokenizer.ggml.token_type"][pieces.index(piece)] = DEFINED
    return oracle, fields
