"""The T5 family's vocabularies: T5's order of extra ids, what decoding keeps, and what a damaged file says."""

import copy
import functools
import json
import pickle

import pytest
import seqio
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import PIECES

from promot_jax.data.vocabularies import load
from promot_jax.data.vocabularies.fast import from_sentencepiece
from promot_jax.data.vocabularies.sentencepiece import ByteVocabulary, SentencePieceVocabulary
from promot_jax.decoding import output_text
from promot_jax.errors import UserError


@pytest.fixture(name="t5", scope="module")
def _t5(tmp_path_factory):
    return tiny.sentencepiece_model(tmp_path_factory.mktemp("t5") / "spiece.model")


@pytest.fixture(name="mt5", scope="module")
def _mt5(tmp_path_factory):
    """Its extra ids are among the pieces."""
    return tiny.sentencepiece_model(tmp_path_factory.mktemp("mt5") / "spiece.model", sentinels=4)


def test_extra_ids_stand_behind_the_pieces_the_first_one_last(t5):
    vocabulary = SentencePieceVocabulary(t5)
    assert vocabulary.vocab_size == PIECES + 100
    assert vocabulary.sentinels == {f"<extra_id_{i}>": PIECES + 99 - i for i in range(100)}
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, None)
    assert not vocabulary.add_bos
    # SeqIO's own reading of the same file agrees, so that data made for T5 keeps its meaning.
    theirs = seqio.SentencePieceVocabulary(str(t5), extra_ids=100)
    for text in ("the film was good", "the <extra_id_0> was <extra_id_1> bad", "", "old\nsongs", "q </s>"):
        ids = list(vocabulary.encode(text))
        assert ids == list(theirs.encode(text)) == vocabulary.encode_tf(text).numpy().tolist()
        assert vocabulary.eos_id not in ids
    assert set(vocabulary.encode("was <extra_id_0> bad")) & set(vocabulary.sentinels.values()) == {PIECES + 99}


def test_extra_ids_that_the_file_brings_are_taken_as_they_are(mt5):
    vocabulary = SentencePieceVocabulary(mt5)
    assert vocabulary.vocab_size == PIECES + 4
    assert vocabulary.sentinels == {f"<extra_id_{i}>": PIECES + 3 - i for i in range(4)}


@pytest.mark.parametrize("published", [False, True])
def test_a_tokenizer_json_reads_data_as_the_sentencepiece_model_does(t5, tmp_path, published):
    """SeqIO's ids of the same model: control tokens stay text, sentinels after a space are one id.

    `published` is how the Hub's T5 tokenizer.json are laid out: words are split off and the mark is always put before.
    """
    seqio_ids = seqio.SentencePieceVocabulary(str(t5), extra_ids=100)
    SentencePieceVocabulary(t5).save(tmp_path)
    if published:
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        data["added_tokens"] = [token | {"lstrip": False} for token in data["added_tokens"]]
        data["model"]["vocab"] += [[f"<extra_id_{i}>", 0.0] for i in range(99, -1, -1)][
            len(data["model"]["vocab"]) - PIECES :
        ]
        mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, mark]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = load.load(tmp_path)
    for other in (vocabulary, copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
        for text in (
            "the film was good", "the <extra_id_0> was <extra_id_1> bad", "<extra_id_99> the", "the <extra_id_1>", "",
            "old\nsongs", "q </s>", "</s>", "<pad> the <unk> film</s>", "the</s>film", "film<extra_id_0> was", "<s>",
        ):  # fmt: skip
            ids = other.encode(text)
            assert ids == list(seqio_ids.encode(text)), text
            assert not {0, 1} & set(ids)
    assert vocabulary.sentinels == SentencePieceVocabulary(t5).sentinels
    ids = vocabulary.encode("the <extra_id_0> film")
    assert vocabulary.decode(ids) == "the film"


def test_decoding_drops_sentinels_unless_they_are_asked_for(t5):
    vocabulary = SentencePieceVocabulary(t5)
    first, second = (vocabulary.sentinels[name] for name in output_text.SENTINELS)
    answer, rest = list(vocabulary.encode("good film")), list(vocabulary.encode("bad"))
    ids = [0, first, *answer, second, *rest, 1, *rest]

    assert vocabulary.decode(ids) == "good film bad"  # up to the first EOS
    assert vocabulary.decode([*answer, PIECES + 100, PIECES + 5000]) == "good film"  # a soft prompt's ids
    spelled = output_text.spelled(ids[:-2], vocabulary.sentinels, vocabulary.decode)
    assert spelled == "<extra_id_0> good film <extra_id_1> bad"
    assert output_text.first_span(spelled) == "good film"


def test_token_strings(t5):
    vocabulary = SentencePieceVocabulary(t5)
    strings = vocabulary.token_strings()
    assert len(strings) == vocabulary.vocab_size
    assert strings[0] == strings[1] == "" and set(strings[PIECES:]) == {""}
    assert {"the", "was"} <= set(strings)
    # No piece holds a line's end: EOS alone stops an output.
    assert output_text.stop_mask(strings, "\n", vocabulary.eos_id).nonzero()[0].tolist() == [1]


def test_equality_goes_by_file(t5, mt5):
    first, again = SentencePieceVocabulary(t5), SentencePieceVocabulary(t5)
    assert first == again == copy.deepcopy(first) and hash(first) == hash(again)
    assert first != SentencePieceVocabulary(mt5)
    assert len({ByteVocabulary(), ByteVocabulary(), first}) == 2


def test_what_is_no_model_is_refused(tmp_path, t5):
    with pytest.raises(UserError, match="Cannot read the SentencePiece model"):
        SentencePieceVocabulary(tmp_path / "none.model")
    damaged = tmp_path / "damaged.model"
    for content in (b"", b"not a model", t5.read_bytes()[:-7]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            SentencePieceVocabulary(damaged)


def test_a_model_without_its_suffix(tmp_path, t5):
    """Read by its content: SentencePiece's own pieces."""
    copied = tmp_path / "cc_all.32000"
    copied.write_bytes(t5.read_bytes())
    vocabulary = load.load(copied)
    assert isinstance(vocabulary, SentencePieceVocabulary) and len(vocabulary.sentinels) == 100
    assert vocabulary.encode("the film was good") == SentencePieceVocabulary(t5).encode("the film was good")
    copied.write_bytes(b"\xff" * 99)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load.load(copied)


def test_a_model_that_is_called_json(tmp_path, t5):
    (tmp_path / "model.json").write_bytes(t5.read_bytes())
    assert load.load(tmp_path / "model.json").encode("the film") == SentencePieceVocabulary(t5).encode("the film")


@pytest.mark.parametrize("kind", ["unigram", "char", "word"])
def test_a_model_with_a_beginning_of_sequence_is_none_of_t5(tmp_path, kind):
    """T5's have none, but for some that transformers calls `spiece.model`; sentinels of others are ids of nothing."""
    size = {"unigram": 40, "char": 20, "word": 16}[kind]
    model = tiny.sentencepiece_model(tmp_path / "m.model", bos_id=3, vocab_size=size, model_type=kind)
    with pytest.raises(UserError, match=r"has a beginning of sequence, which T5's have not.*give the tokenizer.json"):
        load.load(model)
    for name, sentinels in (("spiece.model", 0), ("other.model", 100)):
        assert len(load.load(tiny.sentencepiece_model(tmp_path / name, sentinels, bos_id=3)).sentinels) == 100


def test_a_tiktoken_file(tmp_path):
    """The `tokenizer.model` of Meta's own Llama 3 releases."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UserError, match=r"is not a SentencePiece model but a tiktoken file; give the tokenizer.json"):
        load.load(tmp_path)


@pytest.mark.parametrize("added", [(), ("</s>",), ("<pad>", "</s>")])
def test_a_tokenizer_json_whose_control_tokens_are_no_added_tokens(tmp_path, t5, added):
    """SeqIO's ids, in which data is text; the roles of its config name the control tokens."""
    SentencePieceVocabulary(t5).save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] &= token["content"] not in added
    data["added_tokens"] = [
        token for token in data["added_tokens"] if added or token["content"] not in ("</s>", "<pad>")
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = load.load(tmp_path)
    text = "the </s> film <pad>"
    assert vocabulary.encode(text) == list(SentencePieceVocabulary(t5).encode(text))
    assert vocabulary.decode([0, *vocabulary.encode("film"), 1]) == "film"


def test_bytes():
    vocabulary = ByteVocabulary()
    assert vocabulary.vocab_size == 384
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, None)
    assert vocabulary.encode("a\n") == [100, 13]
    strings = vocabulary.token_strings()
    assert len(strings) == 384 and strings[100] == "a" and set(strings[:3] + strings[259:]) == {""}
    assert output_text.stop_mask(strings, "\n", 1).nonzero()[0].tolist() == [1, 13]
    ids = [258, *vocabulary.encode("né"), 257, *vocabulary.encode("x")]
    assert output_text.spelled(ids, vocabulary.sentinels, vocabulary.decode) == "<extra_id_0> né <extra_id_1> x"


@given(st.text())
def test_every_text_survives_as_bytes(text):
    text = text.encode("utf-8", "ignore").decode()
    vocabulary = ByteVocabulary()
    ids = list(vocabulary.encode(text))
    assert vocabulary.decode([*ids, 1, 100]) == text
    assert not set(ids) & set(vocabulary.sentinels.values())


def test_byte_sentinels_are_those_that_byt5_was_trained_with():
    """The last byte ids, from 258 down: SeqIO's vocabulary without extra ids counts its sentinels from its end.

    The tokens `<extra_id_0>` and so on of transformers' tokenizer lie behind them, and no checkpoint has seen them.
    """
    theirs = pytest.importorskip("transformers").ByT5Tokenizer()
    sentinels = ByteVocabulary().sentinels
    assert sentinels["<extra_id_0>"] == seqio.ByteVocabulary(extra_ids=0).vocab_size - 1 == 258
    assert list(sentinels.values()) == theirs.convert_tokens_to_ids([chr(0xFF - i) for i in range(len(sentinels))])
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == 259 and len(theirs) == ByteVocabulary().vocab_size


def test_bytes_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").ByT5Tokenizer()
    for text in ("", "plain", "né\n\t", "\u4e2d\U0001f600", " two  spaces "):
        assert theirs(text).input_ids == [*ByteVocabulary().encode(text), 1]


# ---- as tokenizer.json -----------------------------------------------------------------------------------------------

# What NFKC and SentencePiece's handling of spaces make something else of; T5's files have the same normaliser.
WILD = (
    "the", "film", " ", "  ", "\n", "\t", ",", ".", "é", "e\u0301", "\ufb01", "½", "猫", "\u3000", "\u200b", "Ⅷ", "x",
    "good", " was", "a", "\u00ad", "ｆｕｌｌ", "👩\u200d🔬", "\x00", "/s>", "\ufeff", "\u2581", "Å", "한", "…",
)  # fmt: skip


@given(st.lists(st.sampled_from(WILD), max_size=12).map("".join))
def test_ids_of_the_converted_tokenizer_are_the_same(t5, text):
    vocabulary = SentencePieceVocabulary(t5)
    fast = fast_of(t5)
    ids = list(vocabulary.encode(text))
    assert fast.encode(text) == ids
    if vocabulary.unk_id not in ids:
        assert fast.decode(ids) == vocabulary.decode(ids)


@functools.cache
def fast_of(path):
    return SentencePieceVocabulary(path).fast()


def test_saved_files_give_transformers_the_same_ids(t5, mt5, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, model in (("t5", t5), ("mt5", mt5)):
        vocabulary = SentencePieceVocabulary(model)
        vocabulary.save(tmp_path / name)
        theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / name), load.load(tmp_path / name)
        assert len(theirs) == again.vocab_size == vocabulary.vocab_size and again.sentinels == vocabulary.sentinels
        for text in ("", "the film <extra_id_0>, good", "<extra_id_0> was  bad <extra_id_1>", "  old\nsongs "):
            assert theirs(text).input_ids == [*vocabulary.encode(text), 1]
        assert (again.eos_id, again.pad_id, again.unk_id, again.bos_id) == (1, 0, 2, None) and not again.add_bos
        assert {theirs.convert_ids_to_tokens(i) for i in vocabulary.sentinels.values()} == set(vocabulary.sentinels)


def test_other_models_are_not_converted(t5, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(t5.read_bytes())
    for key, value, message in (("model_type", 2, "not a unigram"), ("treat_whitespace_as_suffix", True, "ends of")):
        changed = sentencepiece_model_pb2.ModelProto.FromString(proto.SerializeToString())
        setattr(changed.trainer_spec, key, value)
        with pytest.raises(UserError, match=message):
            from_sentencepiece(changed.SerializeToString())


@given(st.text())
def test_bytes_of_the_converted_tokenizer_are_the_same(text):
    text = text.encode("utf-8", "ignore").decode()
    ids = list(ByteVocabulary().encode(text))
    assert BYTES.encode(text) == ids and BYTES.decode(ids) == text


BYTES = ByteVocabulary().fast()
