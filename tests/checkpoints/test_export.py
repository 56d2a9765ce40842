"""Exported folders: files, names, errors, the job. What transformers makes of them is in test_export_variants.py."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import seqio
import tiny

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import main
from promot_jax.checkpoints import export, pretrained
from promot_jax.checkpoints.huggingface import load, safetensors
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.checkpoints.t5x import write
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.params import soft_prompts

VOCAB = 272
PROMPTS = {"b": np.float32(np.random.default_rng(0).standard_normal((2, 32))), "a": np.full((3, 32), 0.5, np.float32)}
TEXT = "the cat sat"


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


def test_files_of_a_folder(base: Pretrained, stripped: Path) -> None:
    again = pretrained.load(str(stripped), Partitioner())
    assert again.fingerprint == base.fingerprint and again.model == base.model and again.vocabulary == base.vocabulary
    assert sorted(path.name for path in stripped.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_note_says_how(prompted: Path) -> None:
    note = (prompted / "README.md").read_text()
    assert "| a | `<promot_a_0>` to `<promot_a_2>` | 272 to 274 |" in note
    assert "| b | `<promot_b_0>` to `<promot_b_1>` | 275 to 276 |" in note
    assert 'tokenizer("".join(prompt) + text, add_special_tokens=False)' in note


def test_control_tokens_in_data(base: Pretrained, stripped: Path, prompted: Path) -> None:
    """Both notes say how transformers reads data as we do, and transformers does."""
    text = f"a{tiny.TOKENS[2]}b"
    for folder in (stripped, prompted):
        tokenizer = hf_models.load(folder)[1]
        assert tokenizer(text).input_ids != base.vocabulary.encode(text)
        assert tokenizer(text, split_special_tokens=True).input_ids == base.vocabulary.encode(text)
        assert "`tokenizer(text, split_special_tokens=True)`" in (folder / "README.md").read_text()
    assert "AutoModelForCausalLM" in (stripped / "README.md").read_text()


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_control_tokens_in_data_of_t5(tmp_path: Path, prompts: Any) -> None:
    """T5's control tokens are pieces of its model: no argument of transformers makes text of them, and the note says
    what does."""
    from promot_jax.data.vocabularies.sentencepiece import SentencePieceVocabulary

    kind, options = hf_models.VARIANTS["T5 1.1"]
    hf_models.save(tmp_path / "source", kind, **options)
    vocabulary = SentencePieceVocabulary(tiny.sentencepiece_model(tmp_path / "spiece.model"))
    base = dataclasses.replace(pretrained.load(str(tmp_path / "source"), Partitioner()), vocabulary=vocabulary)
    export.write(tmp_path / "out", base, prompts)
    tokenizer, end = hf_models.load(tmp_path / "out")[1], [vocabulary.eos_id]
    ours = [*vocabulary.encode("the </s> film"), *end]
    assert tokenizer("the </s> film").input_ids != ours
    assert tokenizer("the </s> film", split_special_tokens=True).input_ids != ours
    apart = tokenizer("the < /s> film").input_ids
    assert apart == [*vocabulary.encode("the < /s> film"), *end] and apart.count(end[0]) == 1
    note = (tmp_path / "out" / "README.md").read_text()
    assert "with `split_special_tokens=True` too" in note and "write a space after their `<`" in note


def test_beginning_of_sequence(base: Pretrained, tmp_path: Path) -> None:
    """Our inputs are the prompt, the beginning of sequence, the text; so are those of the exported tokenizer."""
    ours = TokenizerVocabulary(base.vocabulary.tokenizer_json, eos_id=0, bos_id=1, add_bos=True)
    export.write(tmp_path / "out", dataclasses.replace(base, vocabulary=ours), {"a": PROMPTS["a"]})
    tokenizer, want = hf_models.load(tmp_path / "out")[1], [1, *ours.encode(TEXT)]
    assert tokenizer(TEXT).input_ids == want
    text = "".join(f"<promot_a_{i}>" for i in range(3)) + tokenizer.bos_token + TEXT
    assert tokenizer(text, add_special_tokens=False).input_ids == [VOCAB, VOCAB + 1, VOCAB + 2, *want]
    assert 'tokenizer("".join(prompt) + tokenizer.bos_token + text' in (tmp_path / "out" / "README.md").read_text()
    assert TokenizerVocabulary.load(tmp_path / "out").add_bos


def test_shards(base: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    export.write(tmp_path / "out", base, PROMPTS)
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 2
    state = hf_models.load(tmp_path / "out")[0].state_dict()
    table = base.params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(state["model.embed_tokens.weight"][:VOCAB], table)
    assert load.read(tmp_path / "out", Partitioner()).unused == ()


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
    assert hf_models.load(tmp_path / "out")[1].convert_tokens_to_ids("<promot_c_0>") == VOCAB + 5


def test_job(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())
    info = soft_prompts.PromptInfo("tiny_review", 3, 1, None, "uniform", base.base)
    soft_prompts.save(tmp_path / "prompt", PROMPTS["a"], info)
    command = tiny.command(tiny_folder, "export.gin", tmp_path / "run", PROMPT_PATH=tmp_path / "prompt")
    assert main.main(command) == 0
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found >= {"stripped", "with_prompts", "peft", "results.json"} and "t5x" not in found
    summary = json.loads((tmp_path / "run" / "results.json").read_text())
    assert summary["prompts"] == {"tiny_review": 3} and summary["fingerprint"] == base.fingerprint
    assert pretrained.load(str(tmp_path / "run" / "stripped"), Partitioner()).fingerprint == base.fingerprint
    tokenizer = hf_models.load(tmp_path / "run" / "with_prompts")[1]
    assert tokenizer.convert_tokens_to_ids("<promot_tiny_review_2>") == len(tiny.TOKENS) + 2
    assert main.main(command) == 2
    assert "stripped exists already" in capsys.readouterr().err


def test_job_that_was_killed_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two folders; reference: the same command in a folder of its own."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    formats = {"EXPORT_FORMATS": ["huggingface", "t5x"]}
    command = tiny.command(tiny_folder, "export.gin", tmp_path / "run", **formats)
    with monkeypatch.context() as patch:
        patch.setattr(write, "write", killed)
        assert main.main(command) == 130
    before = (tmp_path / "run" / "stripped" / "model.safetensors").stat()
    left = tmp_path / "run" / "t5x" / ".checkpoint_1.writing-x"  # as a kill that no process survives leaves it
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    other = tiny.command(tiny_folder, "export.gin", tmp_path / "run", **formats, EXPORT_DTYPE="bfloat16")
    assert main.main(other) == 2
    assert "was started with export/dtype = float32, now it is bfloat16" in capsys.readouterr().err
    assert main.main(command) == 0
    after = (tmp_path / "run" / "stripped" / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert main.main(tiny.command(tiny_folder, "export.gin", tmp_path / "whole", **formats)) == 0
    names = [{path.relative_to(run) for path in run.rglob("*")} for run in (tmp_path / "run", tmp_path / "whole")]
    assert names[0] == names[1]
    # T5X's `find_checkpoint` takes the greatest step of a folder, and none if that is 0.
    assert max(int(path.name.removeprefix("checkpoint_")) for path in (tmp_path / "run" / "t5x").iterdir()) > 0
    assert main.main(command) == 2
