"""Tuning of some kernels alone: which leaves of each model family it trains."""

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


MLPS = {"decoder": ["model/decoder/layers/mlp"], "T5": ["model/decoder/layers/mlp", "model/encoder/layers/mlp"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_and_up_projections_alone_are_trained(family: str) -> None:
    (stage,) = METHODS["gate_up_only"]().stages
    model = jax.eval_shape(build(FAMILIES[family][0]).init, jax.random.key(0))
    trained, _ = freezing.split({"model": model}, stage.trains, stage.freeze)
    assert set(trees.flatten(trained)) == {f"{mlp}/{name}/kernel" for mlp in MLPS[family] for name in ("wi_0", "wi_1")}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_all_linear_layers(family: str) -> None:
    """Every kernel of every layer, as PEFT's `target_modules="all-linear"`, which leaves out the output layer."""
    (stage,) = METHODS["lora_all"]().stages
    model = jax.eval_shape(build(FAMILIES[family][0]).init, jax.random.key(0))
    assert stage.lora is not None and stage.lora.scale == 2
    lora = jax.eval_shape(stage.lora.init, jax.random.key(0), model)
    kernels = [path for path in trees.flatten({"model": model}) if "/layers/" in path and path.endswith("/kernel")]
    wanted = {path.replace("kernel", f"lora_{side}").replace("model/", "", 1) for path in kernels for side in "ab"}
    assert set(trees.flatten(lora)) == wanted
