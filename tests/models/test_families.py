"""Features that only Gemma and Qwen have; test_parity.py compares their numbers with PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits

from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build
from promot_jax.models.batch_layout import Tokens

GEMMA = {"activation": "gelu", "norm_offset": 1.0, "post_norms": True, "embedding_scale": True, "norm_eps": 1e-6}
GEMMA |= {"window": 5, "global_every": 2}
SIZES = {"vocab_size": 61, "emb_dim": 48, "num_kv_heads": 2, "mlp_dim": 40}
FAMILIES = {
    "gemma3": DecoderConfig(
        **SIZES, num_heads=4, num_layers=4, head_dim=16, rope_theta=1e6, **GEMMA, qk_norm=True,
        query_scale=24**-0.5, local_rope_theta=1e2, rope_factor=8.0,
    ),
    "gemma2": DecoderConfig(
        **SIZES, num_heads=4, num_layers=4, head_dim=16, **GEMMA, query_scale=16**-0.5, attention_softcap=2.0,
        logits_softcap=3.0,
    ),
    "qwen2": DecoderConfig(**SIZES, num_heads=4, num_layers=2, head_dim=12, qkv_bias=True, tied_embeddings=False),
    "qwen3": DecoderConfig(**SIZES, num_heads=6, num_layers=2, head_dim=20, qk_norm=True, norm_eps=1e-6),
}  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_windows_and_both_kinds_of_rotation_change_the_logits(family):
    """What did nothing would agree with a twin that does nothing, too."""
    noise = np.random.default_rng(0)
    model = build(FAMILIES[family])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(noise.normal(0, x.shape[-1] ** -0.5, x.shape), jnp.float32), shapes)
    batch = model.layout([[Tokens(noise.integers(0, 61, 14).tolist(), [1, 2, 3])] for _ in range(5)], 24, 3)
    known = target_logits(model, params, None, batch)
    for change in ({"window": 0}, {"local_rope_theta": 1e3}):
        other = target_logits(build(dataclasses.replace(model.config, **change)), params, None, batch)
        assert not np.allclose(known, other, rtol=1e-3, atol=1e-3), change


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_has_a_place_on_the_mesh(family):
    shapes = jax.eval_shape(build(FAMILIES[family]).init, jax.random.key(0))
    specs = Partitioner().specs({"model": shapes})
    biases = {path: spec for path, spec in specs.items() if path.endswith("/bias")}
    assert len(biases) == 3 * FAMILIES[family].qkv_bias and all(spec[1] == "model" for spec in biases.values())


def test_config_refuses_what_cannot_be_built():
    config = FAMILIES["gemma3"]
    for change in ({"activation": "swish"}, {"window": -1}, {"global_every": 0}, {"rope_factor": 0.0}):
        with pytest.raises(UserError, match=next(iter(change))):
            dataclasses.replace(config, **change)
