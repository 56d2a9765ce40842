"""Loading a base model: sizes of a gin file are held against its own, and prompts start from its embeddings."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tiny_tasks  # noqa: F401, registers the task

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import main
from promot_jax.checkpoints import placement as places
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.gguf.load import read_config
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments.initial_params import fresh_prompt
from promot_jax.experiments.session import Session
from promot_jax.experiments.settings import Experiment
from promot_jax.methods.promot import STAGE1
from promot_jax.models import DecoderConfig, build
from promot_jax.params.soft_prompts import PromptInit


@pytest.fixture(name="path", scope="module")
def _path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny.tensors()))


def test_sizes_that_agree_are_taken_with_what_a_run_may_choose(path: str) -> None:
    found = DecoderConfig(**read_config(path))
    assert pretrained.load(path, Partitioner(), dtype="bfloat16").model.config == dataclasses.replace(
        found, dtype="bfloat16"
    )
    given = dataclasses.replace(found, max_length=32, remat=True, dropout_rate=0.5)
    loaded = pretrained.load(path, Partitioner(), config=given)
    assert loaded.model.config == dataclasses.replace(given, dropout_rate=0.0)


def test_sizes_that_disagree_are_one_error_before_a_tensor_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(places, "load")
    given = dataclasses.replace(DecoderConfig(**read_config(path)), rope_theta=1e4, window=8, global_every=2)
    with pytest.raises(UserError) as caught:
        pretrained.load(path, Partitioner(), config=given)
    assert "rope_theta 10000.0 instead of 100000.0, window 8 instead of 0, global_every 2 instead of 1" in str(
        caught.value
    )


def test_a_table_may_be_padded(path: str) -> None:
    """Hugging Face's copy of Gemma 3 4B has 64 rows more than the GGUF one; the rows that are there count."""
    found = DecoderConfig(**read_config(path))
    given = dataclasses.replace(found, vocab_size=found.vocab_size - 64, max_length=32)
    config = pretrained.load(path, Partitioner(), config=given).model.config
    assert config == dataclasses.replace(found, max_length=32)
    for rows in (found.vocab_size - 128, found.vocab_size + 64):
        with pytest.raises(UserError, match="vocab_size"):
            pretrained.load(path, Partitioner(), config=dataclasses.replace(found, vocab_size=rows))


def test_a_gin_file_of_another_model_is_refused(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.gin").write_text(tiny.GIN.format(checkpoint=path))
    files = ["icl_eval.gin", tmp_path / "tiny.gin", "models/smollm2_135m.gin"]
    assert main.main([*(f"--gin_file={file}" for file in files), f"--workdir={tmp_path / 'run'}"]) == 2
    assert "is another model than Experiment.model says: vocab_size 49152 instead of" in capsys.readouterr().err


def test_prompts_start_from_what_the_first_layer_reads() -> None:
    """Gemma scales its embeddings, and a soft prompt's rows are taken as they are."""
    config = DecoderConfig(61, 48, 4, 2, 2, 16, 40, embedding_scale=True)
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    experiment = Experiment(
        "", "tiny_review", (), {"inputs": 1, "targets": 1}, "", prompt_init=PromptInit("vocabulary"), prompt_length=9
    )
    base: Any = types.SimpleNamespace(model=model, params=params, vocabulary=types.SimpleNamespace(encode=None))
    (rows,) = fresh_prompt(Session(experiment, base, None), STAGE1).values()
    scaled = np.asarray(params["token_embedder"]["embedding"]) * np.float32(config.emb_dim**0.5)
    assert all((row == scaled).all(-1).any() for row in np.asarray(rows)) and rows.shape == (9, config.emb_dim)
