"""Exported folders of every family and variant: transformers generates what we do, and import gives back every bit."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import tiny
import torch

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import trees
from promot_jax.checkpoints import export, pretrained
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.checkpoints.t5x import write
from promot_jax.data.vocabularies import sentencepiece
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.params import soft_prompts
from promot_jax.params.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PROMPTS = {"b": np.float32(np.random.default_rng(0).standard_normal((2, 32))), "a": np.full((3, 32), 0.5, np.float32)}
TEXTS = ("the cat sat", "Label: 12\n", "x", "the film <extra_id_0> was")
# Decoding compiles longest. T5 behind a SentencePiece model; a tied decoder with windows; an untied one.
QUICK = ("T5 1.1", "Gemma 3", "Llama untied")
DECODED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in hf_models.VARIANTS]


@dataclasses.dataclass
class Exported:
    """A model, and the folders of it."""

    base: Pretrained
    source: Path
    stripped: Path
    prompted: Path

    @property
    def vocab(self) -> int:
        return self.base.model.config.vocab_size


Make = Callable[[str], Exported]


@pytest.fixture(name="exported", scope="module")
def _exported(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def make(name: str) -> Exported:
        folder = tmp_path_factory.mktemp(re.sub(r"\W", "_", name))
        kind, options = hf_models.VARIANTS[name]
        hf_models.save(folder / "source", kind, **options)
        base = pretrained.load(str(folder / "source"), Partitioner())
        if name == "ByT5":
            base = dataclasses.replace(base, vocabulary=sentencepiece.ByteVocabulary())
        elif name in ("T5 1.1", "mT5"):
            path = tiny.sentencepiece_model(folder / "spiece.model", sentinels=100 * (name == "mT5"))
            base = dataclasses.replace(base, vocabulary=sentencepiece.SentencePieceVocabulary(path))
        export.write(folder / "stripped", base)
        export.write(folder / "prompted", base, PROMPTS)
        return Exported(base, folder / "source", folder / "stripped", folder / "prompted")

    return make


def ours(base: Pretrained, rows: list[list[int]]) -> list[list[int]]:
    """Twelve greedy tokens behind each row of ids."""
    tokens = np.zeros((len(rows), 40), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    settings, stops = Decoding(max_tokens=12), np.zeros(base.model.config.vocab_size, bool)
    table, limits = soft_prompts.table(PROMPTS), np.full(len(rows), 12, np.int32)
    ids = generate(base.model, settings, base.params, table, inputs, stops, limits, jax.random.key(0))
    return np.asarray(ids).tolist()


@pytest.mark.parametrize("name", DECODED)
def test_transformers_generates_what_we_do(name: str, exported: Make) -> None:
    """Stripped; and with each prompt and with none. Ids come from the folder's tokenizer, as the usage note says."""
    made = exported(name)
    stripped, tokenizer = hf_models.load(made.stripped)
    end = [made.base.vocabulary.eos_id] if name in ("T5 1.1", "mT5", "ByT5") else []  # T5's own tokenizers put it there
    texts = TEXTS[:-1] if name == "ByT5" else TEXTS  # transformers has names for unused ids of ByT5, SeqIO has not
    plain = {text: [*made.base.vocabulary.encode(text), *end] for text in texts}
    ids = {name: rows.tolist() for name, rows in soft_prompts.layout(PROMPTS, made.vocab).items()} | {"": []}
    asked = [(prompt, text) for prompt in ("a", "b", "") for text in texts]
    rows = [[*ids[prompt], *plain[text]] for prompt, text in asked]
    want = dict(zip(asked, ours(made.base, rows), strict=True))
    assert len({tuple(row) for row in want.values()}) > 4
    for text in texts:
        assert tokenizer(text).input_ids == plain[text]
        assert hf_models.generate(stripped, plain[text]) == want["", text]

    prompted, tokenizer = hf_models.load(made.prompted)
    assert len(tokenizer) == prompted.config.vocab_size == made.vocab + 5
    (said,) = re.findall(r'`(tokenizer\("".*\))`', (made.prompted / "README.md").read_text())
    for (prompt, text), row in zip(asked, rows, strict=True):
        tokens = [f"<promot_{prompt}_{i}>" for i in range(len(ids[prompt]))]
        assert tokenizer.convert_tokens_to_ids(tokens) == ids[prompt]
        assert eval(said, {"tokenizer": tokenizer, "prompt": tokens, "text": text}).input_ids == row
        assert hf_models.generate(prompted, row) == want[prompt, text]
    assert hf_models.generate(prompted, rows[0], suppress_tokens=None) == want[asked[0]]  # by the head alone


@pytest.mark.parametrize("name", DECODED)
def test_prompt_tokens_are_never_generated(name: str, exported: Make) -> None:
    """At a temperature at which all tokens are about as likely; greedily and in beams, whatever the state."""
    made = exported(name)
    model, tokenizer = hf_models.load(made.prompted)
    row = tokenizer("the cat").input_ids
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1000.0, "top_k": 0, "num_return_sequences": 40, "max_new_tokens": 25}
    sampled = hf_models.generate(model, row, **options)
    assert len(sampled) == 1000 and max(sampled) < made.vocab and len(set(sampled)) > 200
    assert max(hf_models.generate(model, row, **options, suppress_tokens=None)) >= made.vocab  # the test can tell
    logits = model.lm_head(torch.randn(1000, 32))
    assert (logits[:, made.vocab :].amax(-1) < logits[:, : made.vocab].amax(-1)).all()


@pytest.mark.parametrize("name", hf_models.VARIANTS)
def test_export_then_import_is_the_identity(name: str, exported: Make, tmp_path: Path) -> None:
    """Bit for bit: Hugging Face's folder in float32 and, of weights that bfloat16 can say, in bfloat16; and T5X's."""
    made = exported(name)
    base = made.base

    def imported(path: Path, **options: Any) -> Pretrained:
        again = pretrained.load(str(path), Partitioner(), **options)
        assert again.model == base.model and again.leaves["new"] == 0
        return again

    again = imported(made.stripped)
    assert again.fingerprint == base.fingerprint and again.leaves["unused"] == 0
    for text in TEXTS[:-1]:  # sentinels in data stay text with a tokenizer.json
        assert list(again.vocabulary.encode(text)) == list(base.vocabulary.encode(text))

    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), base.params)
    export.write(tmp_path / "half", dataclasses.replace(base, params=half), dtype="bfloat16")
    assert hf_models.load(tmp_path / "half")[0].dtype == torch.bfloat16
    assert imported(tmp_path / "half").fingerprint == fingerprint(half) != base.fingerprint

    write.write(tmp_path / "t5x", 0, base.params)
    again = imported(tmp_path / "t5x", config=base.model.config, vocabulary=str(made.source))
    assert again.fingerprint == base.fingerprint

    prompted = trees.flatten(pretrained.load(str(made.prompted), Partitioner()).params)
    for path, leaf in trees.flatten(base.params).items():
        part = prompted[path]
        if path == "token_embedder/embedding":
            part = part[: made.vocab]
        elif path == "decoder/logits_dense/kernel":
            part = part[:, : made.vocab]
        np.testing.assert_array_equal(part, leaf, err_msg=path)


@pytest.mark.parametrize("name", hf_models.VARIANTS)
def test_logits_are_those_of_the_model_it_was_read_from(name: str, exported: Make) -> None:
    """Behind prompts, those of the prompts' rows as embeddings."""
    made = exported(name)
    kind, options = hf_models.VARIANTS[name]
    source = hf_models.build(kind, **options)
    plain, prompted = hf_models.load(made.stripped)[0], hf_models.load(made.prompted)[0]
    ids = torch.arange(3, 23)[None]
    rows = torch.tensor(np.concatenate([PROMPTS["a"], PROMPTS["b"]]))[None]
    embedded = torch.cat([rows, source.get_input_embeddings()(ids)], 1)
    virtual = torch.cat([torch.arange(made.vocab, made.vocab + 5)[None], ids], 1)
    target = {} if made.base.model.continues else {"decoder_input_ids": ids[:, :7]}
    with torch.no_grad():
        torch.testing.assert_close(plain(ids, **target).logits, source(ids, **target).logits)
        want = source(inputs_embeds=embedded, **target).logits
        found = prompted(virtual, **target).logits
    torch.testing.assert_close(found[..., : made.vocab], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert (found[..., made.vocab :].amax(-1) < want.amax(-1)).all()
