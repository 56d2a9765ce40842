"""Exported folders: the same model to transformers and to us, prompts that serve and are never generated."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import seqio
import tiny
import torch
import transformers
from test_hf import DECODERS, PLACES, T5S

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import decoding, main, pretrained, prompts, trees
from promot_jax.convert import export, hf, hf_config, safetensors
from promot_jax.data.vocabularies import TokenizerVocabulary
from promot_jax.errors import UserError
from promot_jax.partitioning import Partitioner
from promot_jax.pretrained import Pretrained

VOCAB = 272
PROMPTS = {"b": np.float32(np.random.default_rng(0).standard_normal((2, 32))), "a": np.full((3, 32), 0.5, np.float32)}
TEXTS = ("the cat sat", "Label: 12\n", "x", "of words: one, two")


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = tmp_path_factory.mktemp("base") / "llama"
    hf_models.save(folder, "llama", tie_word_embeddings=True)
    return pretrained.load(str(folder), Partitioner())


@pytest.fixture(name="stripped", scope="module")
def _stripped(base: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "stripped"
    export.write(folder, base)
    return folder


@pytest.fixture(name="prompted", scope="module")
def _prompted(base: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "with_prompts"
    export.write(folder, base, PROMPTS)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as a user of transformers gets them."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def ours(base: Pretrained, rows: list[list[int]], table: Any) -> list[list[int]]:
    """Twelve greedy tokens behind each row of ids."""
    tokens = np.zeros((len(rows), 32), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    settings, stops = decoding.Decoding(max_tokens=12), np.zeros(VOCAB, bool)
    ids = decoding.generate(
        base.model, settings, base.params, table, inputs, stops, np.full(len(rows), 12, np.int32), jax.random.key(0)
    )
    return np.asarray(ids).tolist()


def theirs(model: Any, row: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([row])
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None} | options
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [int(i) for sample in out for i in sample[len(row) :]]


def test_stripped_generates_what_we_do(base: Pretrained, stripped: Path, fast_compilation: None) -> None:
    model, tokenizer = load(stripped)
    rows = [tokenizer(text).input_ids for text in TEXTS]
    assert rows == [base.vocabulary.encode(text) for text in TEXTS]
    for row, ids in zip(rows, ours(base, rows, None), strict=True):
        assert theirs(model, row) == ids
    assert model.generation_config.eos_token_id == base.vocabulary.eos_id


def test_export_then_import_is_the_identity(base: Pretrained, stripped: Path, tmp_path: Path) -> None:
    again = pretrained.load(str(stripped), Partitioner())
    assert again.fingerprint == base.fingerprint and again.model == base.model and again.vocabulary == base.vocabulary
    assert sorted(path.name for path in stripped.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    export.write(tmp_path / "half", base, dtype="bfloat16")
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), base.params)
    assert pretrained.load(str(tmp_path / "half"), Partitioner()).fingerprint == trees.fingerprint(half)
    assert load(tmp_path / "half")[0].dtype == torch.bfloat16


def test_prompts_serve_what_we_do(base: Pretrained, prompted: Path, fast_compilation: None) -> None:
    """With each prompt and with none, token for token; by ids and by the string in front."""
    model, tokenizer = load(prompted)
    table, ids = prompts.table(PROMPTS), prompts.layout(PROMPTS, VOCAB)
    assert len(tokenizer) == VOCAB + 5 and model.config.vocab_size == VOCAB + 5
    tokens = {name: [f"<promot_{name}_{i}>" for i in range(len(rows))] for name, rows in PROMPTS.items()}
    for name in PROMPTS:
        assert tokenizer.convert_tokens_to_ids(tokens[name]) == ids[name].tolist()
    asked = [(name, text) for name in ("a", "b", "") for text in TEXTS]
    rows = [[*(ids[name].tolist() if name else []), *base.vocabulary.encode(text)] for name, text in asked]
    for (name, text), row, want in zip(asked, rows, ours(base, rows, table), strict=True):
        assert tokenizer("".join(tokens.get(name, [])) + text, add_special_tokens=False).input_ids == row
        assert theirs(model, row) == want
        assert theirs(model, row, suppress_tokens=None) == want  # the head alone sees to it
    assert tokenizer.decode([*rows[0]], skip_special_tokens=True) == TEXTS[0]


def test_prompt_tokens_are_never_generated(prompted: Path) -> None:
    """At a temperature at which every token is about as likely, and greedily on any state."""
    model, tokenizer = load(prompted)
    row = tokenizer("the cat").input_ids
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 100.0, "top_k": 0, "num_return_sequences": 50, "max_new_tokens": 40}
    sampled = theirs(model, row, **options)
    assert len(sampled) == 2000 and max(sampled) < VOCAB and len(set(sampled)) > 200
    assert max(theirs(model, row, **options, suppress_tokens=None)) >= VOCAB  # the test can tell
    states = torch.randn(1000, 32)
    assert model.lm_head(states).argmax(-1).max() < VOCAB


def test_note_says_how(prompted: Path) -> None:
    note = (prompted / "README.md").read_text()
    assert "| a | `<promot_a_0>` to `<promot_a_2>` | 272 to 274 |" in note
    assert "| b | `<promot_b_0>` to `<promot_b_1>` | 275 to 276 |" in note
    assert 'tokenizer("".join(prompt) + text, add_special_tokens=False)' in note


def test_beginning_of_sequence(base: Pretrained, tmp_path: Path) -> None:
    """Our inputs are the prompt, the beginning of sequence, the text; so are those of the exported tokenizer."""
    ours = TokenizerVocabulary(base.vocabulary.tokenizer_json, eos_id=0, bos_id=1, add_bos=True)
    export.write(tmp_path / "out", dataclasses.replace(base, vocabulary=ours), {"a": PROMPTS["a"]})
    tokenizer, want = load(tmp_path / "out")[1], [1, *ours.encode(TEXTS[0])]
    assert tokenizer(TEXTS[0]).input_ids == want
    text = "".join(f"<promot_a_{i}>" for i in range(3)) + tokenizer.bos_token + TEXTS[0]
    assert tokenizer(text, add_special_tokens=False).input_ids == [VOCAB, VOCAB + 1, VOCAB + 2, *want]
    assert 'tokenizer("".join(prompt) + tokenizer.bos_token + text' in (tmp_path / "out" / "README.md").read_text()
    assert TokenizerVocabulary.load(tmp_path / "out").add_bos


def written(folder: Path, loaded: hf.Loaded, rows: dict[str, np.ndarray] | None = None) -> Any:
    """A model of any family as transformers gets it, whether or not we compute it."""
    config = hf_config.full(loaded.family, loaded.config)
    sources = export._sources(loaded.family, config, loaded.params)
    described = hf_config.write(loaded.family, config)
    if rows:
        export._add_prompts(sources, loaded.family, config, loaded.params, rows)
        described |= {"vocab_size": VOCAB + sum(map(len, rows.values())), "tie_word_embeddings": False}
    folder.mkdir()
    safetensors.write(folder / hf.SINGLE, sources)
    (folder / hf.CONFIG).write_text(json.dumps(described))
    kind = transformers.AutoModelForSeq2SeqLM if loaded.family == "t5" else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("case", [*DECODERS, *T5S])
def test_every_family(case: str, tmp_path: Path) -> None:
    """The same logits as the model it was read from; behind prompts, those of the prompts' rows as embeddings."""
    options = DECODERS.get(case, T5S.get(case, {}))
    source = hf_models.save(tmp_path / "in", case.split()[0], **({"tie_word_embeddings": True} | options))
    loaded = hf.read(tmp_path / "in", PLACES)
    plain = written(tmp_path / "plain", loaded)
    prompted = written(tmp_path / "prompted", loaded, PROMPTS)
    ids = torch.arange(3, 23)[None]
    rows = torch.tensor(np.concatenate([PROMPTS["a"], PROMPTS["b"]]))[None]
    embedded = torch.cat([rows, source.get_input_embeddings()(ids)], 1)
    virtual = torch.cat([torch.arange(VOCAB, VOCAB + 5)[None], ids], 1)
    target = {"decoder_input_ids": ids[:, :7]} if loaded.family == "t5" else {}
    with torch.no_grad():
        torch.testing.assert_close(plain(ids, **target).logits, source(ids, **target).logits)
        want = source(inputs_embeds=embedded, **target).logits
        found = prompted(virtual, **target).logits
    torch.testing.assert_close(found[..., :VOCAB], want, rtol=1e-4, atol=1e-5)
    assert (found[..., VOCAB:].amax(-1) < want.amax(-1)).all()


def test_shards(base: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    export.write(tmp_path / "out", base, PROMPTS)
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
    state = load(tmp_path / "out")[0].state_dict()
    table = base.params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(state["model.embed_tokens.weight"][:VOCAB], table)
    assert hf.read(tmp_path / "out", Partitioner()).unused == ()


def test_all_or_nothing(base: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "write", broken)
        with pytest.raises(OSError, match="No space"):
            export.write(tmp_path / "out", base)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export.write(tmp_path / "out", base)
    with pytest.raises(UserError, match="kind ByteVocabulary is not written"):
        export.write(tmp_path / "x", dataclasses.replace(base, vocabulary=seqio.ByteVocabulary()))
    for name, options, message in [
        ("x", {"dtype": "float16"}, "exported as float32 or bfloat16"),
        ("x", {"prompts": {"a>": PROMPTS["a"]}}, "cannot name tokens"),
        ("x", {"prompts": {"a": np.zeros((2, 31), np.float32)}}, "rows of 31, the model of 32"),
    ]:
        with pytest.raises(UserError, match=message):
            export.write(tmp_path / name, base, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_that_are_taken(base: Pretrained, prompted: Path, tmp_path: Path) -> None:
    """An exported model may get further prompts, but not the same ones."""
    again = pretrained.load(str(prompted), Partitioner())
    with pytest.raises(UserError, match="has a token '<promot_a_0>' already"):
        export.write(tmp_path / "out", again, {"a": PROMPTS["a"]})
    export.write(tmp_path / "out", again, {"c": PROMPTS["a"]})
    assert load(tmp_path / "out")[1].convert_tokens_to_ids("<promot_c_0>") == VOCAB + 5


def test_job(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())
    info = prompts.PromptInfo("tiny_review", 3, 1, None, "uniform", base.base)
    prompts.save(tmp_path / "prompt", PROMPTS["a"], info)
    command = tiny.command(tiny_folder, "export.gin", tmp_path / "run", PROMPT_PATH=tmp_path / "prompt")
    assert main.main(command) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"stripped", "with_prompts", "results.json"}
    summary = json.loads((tmp_path / "run" / "results.json").read_text())
    assert summary["prompts"] == {"tiny_review": 3} and summary["fingerprint"] == base.fingerprint
    assert pretrained.load(str(tmp_path / "run" / "stripped"), Partitioner()).fingerprint == base.fingerprint
    tokenizer = load(tmp_path / "run" / "with_prompts")[1]
    assert tokenizer.convert_tokens_to_ids("<promot_tiny_review_2>") == len(tiny.TOKENS) + 2
    assert main.main(command) == 2
    assert "stripped exists already" in capsys.readouterr().err
