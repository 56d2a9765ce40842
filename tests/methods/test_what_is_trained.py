"""Value-only and attention-only tuning: which leaves of each model family they train."""

import jax
import pytest

from promot_jax import trees
from promot_jax.methods import METHODS
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.params import freezing

DECODER = {"model/decoder/layers/self_attention"}
T5 = {f"model/decoder/layers/{name}" for name in ("self_attention", "encoder_decoder_attention")}
T5 |= {"model/encoder/layers/attention"}
FAMILIES = {
    "decoder": (DecoderConfig(24, 16, 2, 1, 2, 8, 24, qkv_bias=True), DECODER),
    "T5": (T5Config(24, 16, 2, 2, 2, 8, 24), T5),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "kernels"), [("value_only", ("value",)), ("attention_only", ("query", "key", "value", "out"))]
)
def test_projections_alone_are_trained(family: str, method: str, kernels: tuple[str, ...]) -> None:
    config, attentions = FAMILIES[family]
    (stage,) = METHODS[method]().stages
    assert stage.freeze is not None and stage.tunes_model
    model = jax.eval_shape(build(config).init, jax.random.key(0))
    trained, _ = freezing.split({"model": model}, stage.trains, stage.freeze)
    assert set(trees.flatten(trained)) == {f"{place}/{name}/kernel" for place in attentions for name in kernels}
    assert not freezing.layer_masks(trained, stage.freeze)  # whole stacks
