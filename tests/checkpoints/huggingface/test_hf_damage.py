"""Damaged Hugging Face folders and tokenizers: the model that was there, or one clear error; nothing run or written."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import damage
import hf_models
import numpy as np
import pytest
from t5x_writer import scratch

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import trees
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.huggingface.load import CONFIG, INDEX
from promot_jax.data.vocabularies import load
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError

TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(name="tmp_path")
def _tmp_path() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer in two files."""
    folder = tmp_path_factory.mktemp("damage") / "llama"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    hf_models.build("llama", num_hidden_layers=1, tie_word_embeddings=True, **sizes).save_pretrained(
        folder, max_shard_size="10KB"
    )
    hf_models.tokenizer(folder)
    return folder


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_folders(folder: Path, tmp_path: Path, count: int) -> None:
    copy = shutil.copytree(folder, tmp_path / "llama")
    shards = sorted(path.name for path in copy.glob("*.safetensors"))
    assert len(shards) == 2
    want, messages, kept = pretrained.load(str(copy), Partitioner()), [], 0
    names = [CONFIG, INDEX, *shards, *TOKENIZER]
    before = sorted(tmp_path.rglob("*"))
    for i, name in enumerate(itertools.islice(damage.damage(copy, names, random.Random(count)), count)):
        with damage.refused(messages, f"{name}, {i}", memory=4 << 20 if i % 10 == 0 else 0):
            found = pretrained.load(str(copy), Partitioner())
            kept += 1
            flat = trees.flatten(found.params)
            assert flat.keys() == trees.flatten(want.params).keys()
            assert all(np.isfinite(leaf).all() for leaf in flat.values())
            # No checksum guards the weights; and a config may say another base of the rotary frequencies, say.
            assert found.fingerprint == want.fingerprint or name in shards
    assert sorted(tmp_path.rglob("*")) == before
    assert 0 < kept < count * 0.7 and len(messages) == count - kept


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_tokenizers(folder: Path, tmp_path: Path, count: int) -> None:
    for name in TOKENIZER:
        shutil.copy(folder / name, tmp_path / name)
    messages: list[str] = []
    for i, name in enumerate(itertools.islice(damage.damage(tmp_path, TOKENIZER, random.Random(count)), count)):
        with damage.refused(messages, f"{name}, {i}", memory=16 << 20 if i % 10 == 0 else 0):
            vocabulary = load.load(tmp_path)
            ids = list(vocabulary.encode("some text <|endoftext|>"))
            assert all(0 <= token < vocabulary.vocab_size for token in (*ids, vocabulary.eos_id, vocabulary.pad_id))
            vocabulary.decode(ids)
    assert count // 5 < len(messages) < count


@pytest.mark.parametrize("name", [CONFIG, INDEX, *TOKENIZER])
@pytest.mark.parametrize("levels", [10, 200, 100_000])
@pytest.mark.parametrize("kind", ["{", "["])
def test_nested_json(folder: Path, tmp_path: Path, name: str, levels: int, kind: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "llama")
    opening, closing = ('{"weight_map":', "}") if kind == "{" else ("[", "]")
    (copy / name).write_text(opening * levels + "1" + closing * levels)
    messages: list[str] = []
    with damage.refused(messages, name):
        pretrained.load(str(copy), Partitioner())
    assert messages
    good = json.loads((folder / name).read_text())
    for key in good if levels == 10 else ():
        (copy / name).write_text(json.dumps(good | {key: damage.nest(10, kind)}))
        with damage.refused(messages, f"{name}: {key}"):
            pretrained.load(str(copy), Partitioner())


def test_a_folder_of_links(folder: Path, tmp_path: Path) -> None:
    for name in [CONFIG, INDEX, *TOKENIZER]:
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).rename(tmp_path / f"{name}.outside")
        (copy / name).symlink_to(tmp_path / f"{name}.outside")
        with pytest.raises(UserError, match="leads to"):
            pretrained.load(str(copy), Partitioner())
