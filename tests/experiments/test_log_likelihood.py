"""Log-likelihoods in batches are those of each pair alone, with and without a soft prompt."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits

from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.experiments.log_likelihood import log_likelihoods
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens

VOCAB = 48
DECODER = DecoderConfig(
    vocab_size=VOCAB, emb_dim=16, num_heads=2, num_kv_heads=1, num_layers=1, head_dim=8, mlp_dim=16, max_length=64
)
T5 = T5Config(
    vocab_size=VOCAB, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=16
)


@pytest.mark.parametrize("config", [DECODER, T5])
def test_against_each_pair_alone(config: Any) -> None:
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    table = jax.random.normal(jax.random.key(1), (3, 16))
    noise = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return noise.integers(0, VOCAB, length).tolist()

    inputs = [[*range(VOCAB, VOCAB + 3), *ids(n)] if n % 2 else ids(n) for n in (1, 4, 5, 7, 2, 3)]
    pairs = [Tokens(row, ids(n)) for row, n in zip(inputs, (1, 2, 9, 4, 1, 8), strict=True)]
    alone = []
    for pair in pairs:
        batch = model.layout([[pair]], 16, 16)
        logs = jax.nn.log_softmax(target_logits(model, params, table, batch)[0, : len(pair.targets)])
        alone.append((float(logs[np.arange(len(pair.targets)), pair.targets].sum()), logs.argmax(axis=-1).tolist()))
    pairs.append(Tokens(pairs[1].inputs, alone[1][1][:1]))  # the likeliest token
    found = log_likelihoods(model, params, table, pairs, Partitioner(), tokens_per_batch=64)
    np.testing.assert_allclose([score for score, _ in found[:-1]], [score for score, _ in alone], rtol=1e-5)
    assert [greedy for _, greedy in found[:-1]] == [
        pair.targets == best for pair, (_, best) in zip(pairs, alone, strict=False)
    ]
    assert found[-1][1] and jnp.isfinite(found[-1][0])
    for wrong in (Tokens([], [1]), Tokens([1], []), Tokens([1] * 9000, [1])):
        with pytest.raises(UserError, match="has no log-likelihood"):
            log_likelihoods(model, params, table, [wrong], Partitioner())
