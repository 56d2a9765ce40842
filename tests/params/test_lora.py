"""LoRA: the outputs and gradients of peft's on a Llama, merged as attached, gone when it is removed."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from forward import target_logits

from promot_jax import trees
from promot_jax.checkpoints.huggingface import load
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.params import lora
from promot_jax.params.fingerprint import fingerprint
from promot_jax.params.lora import Lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]
MODULES = {"q_proj": "self_attention/query", "v_proj": "self_attention/value", "down_proj": "mlp/wo"}
SHAPE = Lora(rank=3, alpha=5.0, targets=(r"model/.*attention/(query|value)/kernel", r"model/.*/mlp/wo/kernel"))


class Ours(NamedTuple):
    """The same model as ours."""

    model: Any
    params: Any


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """peft's model, ours, and the same random A and B as our tree."""
    import peft
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=272, hidden_size=32, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder)
    settings = peft.LoraConfig(r=SHAPE.rank, lora_alpha=SHAPE.alpha, target_modules=list(MODULES), lora_dropout=0.0)
    theirs = peft.get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    loaded = load.read(folder, Partitioner())
    ours = Ours(build(DecoderConfig(**loaded.config)), loaded.placed.params)
    leaves = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters() if "lora_" in name}
    flat = {}
    for short, module in MODULES.items():
        for part in ("A", "B"):
            names = [name for name in leaves if f".{short}.lora_{part}." in name]  # layers in order
            assert len(names) == base.config.num_hidden_layers
            flat[f"decoder/layers/{module}/lora_{part.lower()}"] = np.stack([leaves[name].T for name in names])
    return theirs, ours, trees.unflatten(flat)


def test_logits_and_gradients_are_pefts(pair: tuple[Any, Any, Any]) -> None:
    import torch

    theirs, ours, updates = pair
    ids = np.random.default_rng(0).integers(0, ours.model.config.vocab_size, (2, 9))
    batch = decoder_rows([[Tokens(row[:1].tolist(), row[1:].tolist())] for row in ids], 9, 8)
    want = theirs(input_ids=torch.tensor(ids)).logits[:, :-1]
    torch.logsumexp(want, -1).sum().backward()

    def total(updates: Any) -> tuple[Any, Any]:
        logits = target_logits(ours.model, lora.attach(ours.params, updates, SHAPE), None, batch)
        return jax.nn.logsumexp(logits, -1).sum(), logits

    grads, logits = jax.jit(jax.grad(total, has_aux=True))(updates)
    np.testing.assert_allclose(logits, want.detach().numpy(), atol=2e-4)
    plain = functools.partial(target_logits, ours.model)(ours.params, None, batch)
    assert np.abs(logits - plain).max() > 0.1  # it does something
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            layer, short, part = int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-4], name.split(".")[-3]
            ours_there = trees.flatten(grads)[f"decoder/layers/{MODULES[short]}/{part.lower()}"][layer]
            theirs_there = parameter.grad.numpy().T
            np.testing.assert_allclose(ours_there, theirs_there, atol=1e-3 * np.abs(theirs_there).max(), err_msg=name)


def test_merged_is_attached_and_removed_is_plain(pair: tuple[Any, Any, Any]) -> None:
    _, ours, updates = pair
    batch = decoder_rows([[Tokens([5, 6, 7], [8, 9])]], 8, 2)
    before = fingerprint(ours.params)
    params = {"model": ours.params, "lora": updates, "prompt": {}}
    merged = lora.merge(params, SHAPE)

    assert merged.keys() == {"model", "prompt"}
    assert trees.flatten(merged["model"]).keys() == trees.flatten(ours.params).keys()
    logits = functools.partial(target_logits, ours.model)
    attached = logits(lora.attach(ours.params, updates, SHAPE), None, batch)
    np.testing.assert_allclose(logits(merged["model"], None, batch), attached, atol=1e-4)
    assert fingerprint(ours.params) == before
    assert lora.merge({"model": ours.params}, None)["model"] is ours.params
    plain = lora.attach(ours.params, None, None)
    assert all(leaf is trees.flatten(ours.params)[path] for path, leaf in trees.flatten(plain).items())


def test_it_starts_as_no_change_at_all(pair: tuple[Any, Any, Any]) -> None:
    _, ours, updates = pair
    fresh = SHAPE.init(jax.random.key(0), ours.params)
    flat = trees.flatten(fresh)
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        path: leaf.shape for path, leaf in trees.flatten(updates).items()
    }
    for path, leaf in flat.items():
        rows = leaf.shape[-2]
        assert not leaf.any() if path.endswith("lora_b") else leaf.std() == pytest.approx(rows**-0.5, rel=0.3)
    batch = decoder_rows([[Tokens([5, 6, 7], [8, 9])]], 8, 2)
    logits = functools.partial(target_logits, ours.model)
    attached = logits(lora.attach(ours.params, fresh, SHAPE), None, batch)
    np.testing.assert_allclose(attached, logits(ours.params, None, batch), rtol=0, atol=1e-6)
    merged = lora.merge({"model": ours.params, "lora": fresh}, SHAPE)["model"]
    assert fingerprint(merged) == fingerprint(ours.params)


def test_encoder_and_decoder_of_a_t5() -> None:
    config = T5Config(
        vocab_size=61, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=3, head_dim=8, mlp_dim=24
    )
    model = build(config)
    noise = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    shape = Lora(rank=2)
    drawn = jax.tree.map(
        lambda x: noise.normal(0, 1, x.shape).astype(np.float32), shape.init(jax.random.key(1), params)
    )
    stacks = {path.split("/layers/")[0]: leaf.shape[0] for path, leaf in trees.flatten(drawn).items()}
    assert stacks == {"encoder": 2, "decoder": 3}
    Partitioner().place({"model": params, "lora": drawn})  # every leaf has its row
    batch = model.layout([[Tokens([5, 6, 7], [8, 9])]], 8, 2)
    logits = functools.partial(target_logits, model)
    attached = logits(lora.attach(params, drawn, shape), None, batch)
    merged = logits(lora.merge({"model": params, "lora": drawn}, shape)["model"], None, batch)
    np.testing.assert_allclose(merged, attached, rtol=1e-3, atol=1e-3)
    assert np.abs(attached - logits(params, None, batch)).max() > 0.1


@pytest.mark.parametrize("change", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}])
def test_sizes_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="LoRA needs a rank of at least 1"):
        dataclasses.replace(SHAPE, **change)


def test_targets_that_match_no_kernel(pair: tuple[Any, Any, Any]) -> None:
    with pytest.raises(UserError, match=r"'model/.*/kernal' matches no parameter"):
        Lora(targets=("model/.*/kernal",)).init(jax.random.key(0), pair[1].params)
