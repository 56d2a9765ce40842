"""SentencePiece tokenizers from GGUF against SentencePiece itself; Qwen's way of cutting text against transformers."""

import inspect
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_vocabularies import WILD, other_reader
from tiny_tokenizers import BYTE, CONTROL, CORPUS, DEFINED, NORMAL, train
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.data.batches import TrainBatches
from promot_jax.data.encoding import Encoder
from promot_jax.data.examples import Example
from promot_jax.data.vocabularies.load import load
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build

PARTS = ["the", " cat", "  ", "   ", " ", "\n", "\n\n", "\t", "▁", "<pad>", "<bos>", "<b>", "<0x41>", "é", "猫", "7."]


@pytest.fixture(name="gemma", scope="module")
def _gemma() -> tuple[Any, dict[str, Any], TokenizerVocabulary]:
    oracle, fields = train(prefix=False)
    return oracle, fields, TokenizerVocabulary.from_gguf(fields)


@pytest.fixture(name="llama", scope="module")
def _llama() -> tuple[Any, TokenizerVocabulary]:
    oracle, fields = train(prefix=True)
    return oracle, TokenizerVocabulary.from_gguf(fields)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.model", "vocabulary", "folder"])
def test_a_sentencepiece_file_of_this_kind(tmp_path: Path, prefix: bool, name: str) -> None:
    """A Llama's `tokenizer.model` is told from T5's by its content: SentencePiece's ids, a BOS, no sentinels."""
    oracle, fields = train(prefix)
    path = tmp_path / name
    file = path / "tokenizer.model" if name == "folder" else path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(oracle.serialized_model_proto())
    vocabulary = load(path)
    assert vocabulary == TokenizerVocabulary.from_gguf(fields)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos, vocabulary.sentinels) == (2, 1, True, {})
    assert vocabulary.vocab_size == oracle.get_piece_size()
    for text in [*WILD, *sample(100), "a <extra_id_0> b"]:
        assert vocabulary.encode(text) == oracle.encode(text), repr(text)


def sample(count: int) -> list[str]:
    rng = random.Random(0)
    words = [*WILD, *PARTS, *" ".join(CORPUS).split()]
    return ["".join(rng.choice(words) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def test_ids_are_those_of_sentencepiece(gemma: tuple[Any, Any, TokenizerVocabulary]) -> None:
    oracle, _, vocabulary = gemma
    assert vocabulary.add_bos and (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (2, 1, 0)
    for text in [*WILD, *sample(500)]:
        assert vocabulary.encode(text) == oracle.encode(text), repr(text)
        if "▁" not in text:  # SentencePiece cannot tell it from a space
            assert vocabulary.decode(vocabulary.encode(text)) == text


def test_ids_with_a_space_in_front(llama: tuple[Any, TokenizerVocabulary]) -> None:
    oracle, vocabulary = llama
    for text in [*WILD, *sample(500)]:
        assert vocabulary.encode(text) == oracle.encode(text), repr(text)
        if "▁" not in text:
            assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
    ("inputs", "targets", "both"),
    [
        ("the answer:", "the", "the answer: the"),
        ("the answer:", " the", "the answer: the"),
        ("the answer:", "  the", "the answer:  the"),
        ("the answer:\n", "the", "the answer:\nthe"),
        ("the answer:\n", " the", "the answer:\nthe"),
        ("the answer:", "\nthe", "the answer:\nthe"),
        ("the answer:", "", "the answer:"),
    ],
)
def test_targets_have_the_ids_of_the_joined_text(
    llama: tuple[Any, TokenizerVocabulary], gemma: Any, tmp_path: Path, inputs: str, targets: str, both: str
) -> None:
    """SentencePiece's own ids of both texts together, which it would not give the target alone."""
    example = Example("task", "id", inputs, targets, (), "", 0)
    llama[1].save(tmp_path)  # as a tokenizer.json: Prepend and Replace
    fields = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}  # the newer form
    (tmp_path / "newer").mkdir()
    shutil.copy(tmp_path / "tokenizer_config.json", tmp_path / "newer")
    newer = fields | {"normalizer": None, "pre_tokenizer": mark}
    (tmp_path / "newer/tokenizer.json").write_text(json.dumps(newer), "utf-8")
    read = [TokenizerVocabulary.load(folder) for folder in (tmp_path, tmp_path / "newer")]
    for oracle, vocabulary in (llama, gemma[::2], *((llama[0], one) for one in read)):
        tokens = Encoder.of(vocabulary, continues=True).tokens(example)
        start, want = [2, *oracle.encode(inputs)], [2, *oracle.encode(both), 1]
        assert tokens.inputs == start and [*tokens.inputs, *tokens.targets] == want


@pytest.mark.parametrize("kind", [NORMAL, DEFINED])
def test_a_control_token_of_another_type(
    gemma: tuple[Any, dict[str, Any], Any], kind: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Gemma's published files have it; llama.cpp overrides the type of this name."""
    oracle, fields, _ = gemma
    fields = fields | {
        "tokenizer.ggml.tokens": [*fields["tokenizer.ggml.tokens"], "<end_of_turn>"],
        "tokenizer.ggml.scores": np.append(fields["tokenizer.ggml.scores"], np.float32(-1000)),
        "tokenizer.ggml.token_type": np.append(fields["tokenizer.ggml.token_type"], np.int32(kind)),
    }
    vocabulary = TokenizerVocabulary.from_gguf(fields)
    assert "Warning: the tokenizer has '<end_of_turn>' as text" in capsys.readouterr().out
    text, control = "the <end_of_turn> cat", oracle.get_piece_size()
    ids = vocabulary.encode(text)
    assert ids == oracle.encode(text) and control not in ids and vocabulary.decode(ids) == text
    assert vocabulary.decode([*oracle.encode("the"), control]) == "the"


def test_a_token_that_would_cross_into_the_target_does_not(llama: tuple[Any, TokenizerVocabulary]) -> None:
    """ "▁the" is one token for SentencePiece; an input that ends in a space has that space already."""
    oracle, vocabulary = llama
    crossing = Example("task", "id", "the answer: ", "the", (), "", 0)
    tokens = Encoder.of(vocabulary, continues=True).tokens(crossing)
    assert oracle.encode("the answer: the")[-1] == oracle.piece_to_id("▁the") not in tokens.targets
    assert tokens.inputs == [2, *oracle.encode("the answer: ")]
    assert tokens.targets == [*oracle.encode("\nthe")[len(oracle.encode("\n")) :], 1]
    assert oracle.decode([*tokens.inputs[1:], *tokens.targets[:-1]]) == "the answer: the"


def test_an_answer_of_one_piece_needs_room_for_one(llama: tuple[Any, TokenizerVocabulary]) -> None:
    """It trains on SentencePiece's one piece of the text of both and EOS, not on a space piece before them, too."""
    oracle, vocabulary = llama
    layout = build(DecoderConfig(vocabulary.vocab_size, 16, 2, 1, 1, 8, 24)).layout
    example = Example("task", "id", "the answer:", "the", (), "", 0)
    encoder = Encoder.of(vocabulary, continues=True)
    lengths = {"inputs": 32, "targets": 2}
    stream = TrainBatches(itertools.repeat(example), encoder, layout, batch_size=1, feature_lengths=lengths)
    batch = next(iter(stream))
    assert batch["targets"][batch["weights"] > 0].tolist() == [oracle.piece_to_id("▁the"), vocabulary.eos_id]


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.lists(st.one_of(st.text(max_size=4), st.sampled_from(PARTS))).map("".join))
def test_any_text(gemma: tuple[Any, Any, TokenizerVocabulary], text: str) -> None:
    oracle, _, vocabulary = gemma
    ids = vocabulary.encode(text)
    assert min(ids, default=4) >= 4  # no control token
    assert ids == oracle.encode(text)


def test_controls_count_for_other_readers(gemma: tuple[Any, Any, TokenizerVocabulary], tmp_path: Path) -> None:
    _, _, vocabulary = gemma
    assert other_reader(vocabulary)("<bos>the cat")[0] == 2
    assert vocabulary.decode([2, *vocabulary.encode("the cat"), 1, 9]) == "the cat"
    vocabulary.save(tmp_path)
    assert TokenizerVocabulary.load(tmp_path) == vocabulary


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("scores", lambda scores: scores[:-1], "usable scores"),
        ("scores", lambda scores: scores * np.nan, "usable scores"),
        ("token_type", lambda types: np.where(types == BYTE, NORMAL, types), "no tokens for 256 of the 256 bytes"),
        ("token_type", lambda types: np.full_like(types, CONTROL) * (types != BYTE) + types * (types == BYTE), "plain"),
        ("tokens", lambda tokens: [*tokens[:-1], tokens[-2]], "distinct"),
    ],
)
def test_what_does_not_fit_is_one_error(
    gemma: tuple[Any, dict[str, Any], Any], field: str, change: Any, message: str
) -> None:
    key = f"tokenizer.ggml.{field}"
    with pytest.raises(UserError, match=message):
        TokenizerVocabulary.from_gguf(gemma[1] | {key: change(gemma[1][key])})


def test_add_bos_is_what_the_file_says(gemma: tuple[Any, dict[str, Any], Any]) -> None:
    fields = gemma[1]
    assert not TokenizerVocabulary.from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}).add_bos
    without = {key: value for key, value in fields.items() if key != "tokenizer.ggml.bos_token_id"}
    assert not TokenizerVocabulary.from_gguf(without).add_bos


def byte_level(pre: str, **fields: Any) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE trained across all cuts, and the metadata of a GGUF file of it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges across cuts too
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"],
        show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator([*CORPUS, *WILD], trainer)
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return trained, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([CONTROL] + [NORMAL] * (len(tokens) - 1), np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in fields.items()},
    }


def test_qwen_cuts_text_as_its_own_tokenizer_does() -> None:
    qwen = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    trained, fields = byte_level("qwen2")
    vocabulary = TokenizerVocabulary.from_gguf(fields)
    assert not vocabulary.add_bos
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    oracle = qwen.Qwen2Tokenizer(vocab=trained.get_vocab(), merges=merges)
    ours = other_reader(vocabulary)
    for text in [*WILD, *sample(300)]:
        assert ours(text) == oracle(text)["input_ids"], repr(text)


def test_llama_3_cuts_text_as_transformers_does() -> None:
    """Up to three digits stay together, and a piece that is a token becomes it though no merges lead there."""
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter
    _, fields = byte_level("llama-bpe", bos_token_id=0)
    tokens = [*fields["tokenizer.ggml.tokens"], "Ġwhole", "789"]
    fields |= {"tokenizer.ggml.tokens": tokens}
    fields["tokenizer.ggml.token_type"] = np.array([CONTROL] + [NORMAL] * (len(tokens) - 1), np.int32)
    vocabulary = TokenizerVocabulary.from_gguf(fields)
    assert (
        vocabulary.add_bos
        and not TokenizerVocabulary.from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}).add_bos
    )
    pattern = inspect.signature(converter.__init__).parameters["pattern"].default
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    oracle = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in [*WILD, *sample(300), "a whole 123456789 12789"]:
        assert vocabulary.encode(text) == oracle.encode(text).ids, repr(text)
    assert vocabulary.encode(" whole") == [len(tokens) - 2] and vocabulary.encode("123789")[-1] == len(tokens) - 1
    # Text must not become a control token by being one.
    assert 0 not in vocabulary.encode("<|endoftext|>")
    fields["tokenizer.ggml.tokens"] = ["stop", *tokens[1:]]
    with pytest.raises(UserError, match="control token 'stop', which is one word"):
        TokenizerVocabulary.from_gguf(fields)
