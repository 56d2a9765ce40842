"""Adapters for PEFT: loaded by `PeftModel.from_pretrained` on the exported model, they compute what we do."""

import functools
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest
import torch
from forward import target_logits

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.checkpoints import export, formats, pretrained
from promot_jax.checkpoints.huggingface import peft
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.checkpoints.trained_lora import TrainedLora
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import lora, soft_prompts
from promot_jax.params.lora import Lora

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # `generate` gives peft some
]
STEPS = 12
PROMPTS = {"review": np.float32(np.random.default_rng(0).standard_normal((4, 32)))}
ROWS = [[5, 9, 200], [7, 7, 31, 100, 3, 64, 12]]
# Decoding compiles longest. Gemma 3 has an embedding that is scaled, and windows.
VARIANTS = [name if name == "Gemma 3" else pytest.param(name, marks=pytest.mark.slow) for name in hf_models.VARIANTS]
LAYERS, ALL = "model/.*/layers/.*/kernel", "model/.*kernel"  # ALL has the head too


@functools.cache
def exported(folder: Path, name: str) -> Pretrained:
    """A variant, exported to a folder with its soft prompt."""
    kind, options = hf_models.VARIANTS[name]
    hf_models.save(folder / "source", kind, **options)
    base = pretrained.load(str(folder / "source"), Partitioner())
    for made in formats.folders(("huggingface", "peft"), prompts=True):
        formats.write(folder, made, formats.Exported(base, PROMPTS))
    return base


def peft_model(adapter: Path, base: Path) -> Any:
    """The adapter as a user of PEFT gets it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_models.load(base)[0], str(adapter)).eval()


def their_logits(model: Any, inputs: list[int], targets: list[int]) -> np.ndarray:
    """Logits `[targets, vocab]` of PyTorch."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            ids, decoder = torch.tensor([inputs]), torch.tensor([[0, *targets[:-1]]])
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder).logits[0]
        else:
            ids = torch.tensor([[*inputs, *targets[:-1]]])
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return np.asarray(out[-len(targets) :])


def our_logits(base: Pretrained, params: Any, table: Any, inputs: list[int], targets: list[int]) -> np.ndarray:
    batch = base.model.layout([[Tokens(inputs, targets)]], 32, len(targets))
    return np.asarray(target_logits(base.model, params, table, batch))[0]


def ours(base: Pretrained, row: list[int]) -> list[int]:
    """Greedy tokens."""
    inputs = {"tokens": np.array([row + [0] * (40 - len(row))], np.int32), "lengths": np.array([len(row)], np.int32)}
    stops, limits = np.zeros(base.model.config.vocab_size, bool), np.full(1, STEPS, np.int32)
    settings, table = Decoding(max_tokens=STEPS), soft_prompts.table(PROMPTS)
    return np.asarray(generate(base.model, settings, base.params, table, inputs, stops, limits, jax.random.key(0)))[
        0
    ].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_soft_prompt(name: str, tmp_path: Path) -> None:
    """Logits, and greedy generations token for token."""
    base = exported(tmp_path, name)
    model = peft_model(tmp_path / "peft" / "review", tmp_path / "stripped")
    virtual = soft_prompts.layout(PROMPTS, base.model.config.vocab_size)["review"].tolist()
    seen = set()
    for row in ROWS:
        want = ours(base, virtual + row)
        assert hf_models.generate(model, row, use_cache=False) == want
        theirs = their_logits(model, row, want)
        found = our_logits(base, base.params, soft_prompts.table(PROMPTS), virtual + row, want)
        np.testing.assert_allclose(found, theirs, 1e-4, 1e-4 * np.abs(theirs).max())
        plain = our_logits(base, base.params, None, row, want)
        assert np.abs(plain - theirs).max() > 0.05  # the prompt does something
        seen.add(tuple(want))
    assert len(seen) == 2


def randomized(tree: Any) -> Any:
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + np.float32(noise.normal(0, 0.2, leaf.shape)), tree)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("Llama untied", ALL), pytest.param("T5 1.1", LAYERS, marks=pytest.mark.slow)],
)
def test_lora(name: str, targets: str, tmp_path: Path) -> None:
    base = exported(tmp_path, name)
    family, config = export.described(base)
    settings = Lora(rank=3, alpha=5.0, targets=(targets,))
    tree = randomized(settings.init(jax.random.key(0), base.params))
    (tmp_path / "lora").mkdir()
    peft.write_lora(tmp_path / "lora", family, config, tree, settings, str(tmp_path / "stripped"))
    theirs = their_logits(peft_model(tmp_path / "lora", tmp_path / "stripped"), ROWS[1], ROWS[0])
    merged = lora.merge({"model": base.params, "lora": tree}, settings)["model"]
    found = our_logits(base, merged, None, ROWS[1], ROWS[0])
    np.testing.assert_allclose(found, theirs, 1e-4, 2e-4 * np.abs(theirs).max())
    assert np.abs(our_logits(base, base.params, None, ROWS[1], ROWS[0]) - theirs).max() > 0.05


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    base = exported(tmp_path, "Llama untied")
    for refused, message in (
        (formats.Exported(base, {"../x": PROMPTS["review"]}), "cannot name tokens"),
        (formats.Exported(base, {"x": np.zeros((2, 31), np.float32)}), "rows of 31, the model of 32"),
    ):
        with pytest.raises(UserError, match=message):
            formats.write(tmp_path / "refused", formats.PEFT, refused)
    assert not list((tmp_path / "refused").iterdir())


def test_where_the_base_model_of_lora_is(tmp_path: Path) -> None:
    """A model that PEFT loads is named; another one is exported, but cannot be on the hub."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def folders(checkpoint: str, hub: str = "") -> list[str]:
        return formats.folders(["peft"], prompts=False, lora=TrainedLora(tmp_path, 1, Lora(), checkpoint), hub=hub)

    assert folders("org/name") == folders("hf://org/name", "org/mine") == folders("") == ["peft"]
    assert folders(str(tmp_path / "model")) == ["peft"] and folders("asset:model") == ["base", "peft"]
    for checkpoint in ("asset:model", str(tmp_path / "model")):
        with pytest.raises(UserError, match="which is not on the Hugging Face hub"):
            folders(checkpoint, "org/mine")
