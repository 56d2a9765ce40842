"""Exports of finished runs with LoRA: PEFT computes what the run evaluated."""

import json
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import tiny
import torch
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import main
from promot_jax.checkpoints import pretrained, trained_lora
from promot_jax.checkpoints.stage_folder import describe
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]


@pytest.fixture(name="source", scope="module")
def _source(tiny_folder: Path) -> Path:
    """The tiny model as a Hugging Face folder."""
    assert main.main(tiny.command(tiny_folder, "export.gin", tiny_folder / "source")) == 0
    return tiny_folder / "source" / "stripped"


@pytest.mark.parametrize("method", ["lora", "lora of GGUF", "promot_lora"])
def test_lora_of_a_run(method: str, tiny_folder: Path, source: Path, tmp_path: Path) -> None:
    """Kept LoRA is loaded on the base model, that of stage 1 on the model that stage 2 left."""
    from peft import PeftModel

    method, _, is_gguf = method.partition(" of ")
    source = tiny_folder / "tiny.gguf" if is_gguf else source
    checkpoint: dict[str, Any] = {"INITIAL_CHECKPOINT_PATH": source}
    command = tiny.command(tiny_folder, "method.gin", tmp_path / "run", METHOD=method, **checkpoint)
    assert main.main([*command, "--gin.LORA_LEARNING_RATE=0.05"]) == 0
    run = {"INITIAL_CHECKPOINT_PATH": tmp_path / "run"}
    assert main.main(tiny.command(tiny_folder, "export.gin", tmp_path / "out", **run)) == 0

    found = trained_lora.find(str(tmp_path / "run"))
    assert found is not None and (found.checkpoint == str(source)) == (method == "lora")
    base = pretrained.load(found.checkpoint or str(tmp_path / "run"), Partitioner())
    tree = found.read(base.params, Partitioner())
    merged = lora.merge({"model": base.params, "lora": tree}, found.settings)["model"]
    last = "lora" if method == "lora" else "stage2_lora"
    assert describe(tmp_path / "run" / last) is not None
    if method == "lora":
        left = pretrained.load(str(tmp_path / "run"), Partitioner())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left.params, merged)

    ids = [5, 9, 200, 7, 31]
    batch = base.model.layout([[Tokens(ids[:1], ids[1:])]], 8, 4)
    ours = target_logits(base.model, merged, None, batch)[0]
    kept = tmp_path / "out" / "base" if is_gguf else source
    model = hf_models.load(kept if method == "lora" else tmp_path / "out" / "stripped")[0]
    config = json.loads((tmp_path / "out" / "peft" / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.name_or_path
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([ids])).logits[0, :-1].numpy()
        adapter = PeftModel.from_pretrained(model, str(tmp_path / "out" / "peft" / "lora")).eval()
        theirs = adapter(input_ids=torch.tensor([ids])).logits[0, :-1].numpy()
    np.testing.assert_allclose(ours, theirs, 1e-4, 1e-4 * np.abs(theirs).max())
    assert np.abs(theirs - plain).max() > 1e-3
