"""What a training step needs per device, estimated from shapes: says which layouts are worth compiling, and no more."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from promot_jax.models import T5Config
from promot_jax.models.layers import is_kept
from promot_jax.precompile import roofline
from promot_jax.precompile.programs import Programs

_UNUSED = "wo"  # the linear layer whose output no backward pass needs


class Estimate(NamedTuple):
    """Of a training step on one device."""

    memory: float  # bytes, rather too few: without copies and workspace
    compute: float  # seconds of products at the chip's peak
    links: float  # seconds of what is sent over all links of the chip

    @property
    def seconds(self) -> float:
        """A step takes at least the longer of the two."""
        return max(self.compute, self.links)


class _Layer(NamedTuple):
    """A kind of linear layer in a stack of layers."""

    name: str
    tokens: int  # of a row that it maps
    weights: float  # of all layers of the stack
    inputs: float  # features of all layers of the stack together
    outputs: float  # likewise
    is_split: bool  # its outputs, over the mesh axis `model`


def estimate(programs: Programs, program: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Estimate:
    """Estimates the training step `program` on a mesh with one device per chip; `shapes` are the model's, by path.

    The model's weights are gathered over `fsdp` for the forward and for the backward pass, in bfloat16; gradients in
    float32 are scattered over `fsdp` and summed over `data`. Over `model`, in float32, are summed the outputs of layers
    whose inputs are split, and for each layer whose outputs are split the gradient of its input.
    """
    stage = programs.stage(program)
    assert stage is not None
    training, config = programs.tuning.of(stage), programs.model().config
    chip = roofline.CHIPS[programs.topology.partition(":")[0]]
    data, fsdp, model = (programs.partitioner.mesh().shape[axis] for axis in ("data", "fsdp", "model"))
    lengths = dict(programs.experiment.lengths)
    lengths["inputs"] += programs.experiment.prompt_length if stage.prompt else 0
    trains, remat, parts = "model" in stage.trains, str(config.remat), training.microbatches
    rows = training.batch_size / (data * fsdp)

    layers = _layers(shapes, lengths, isinstance(config, T5Config))
    weights = float(sum(math.prod(leaf.shape) for leaf in shapes.values()))
    again = sum(
        2 * layer.weights * layer.tokens for layer in layers if layer.name != _UNUSED and not is_kept(remat, layer.name)
    )
    tokens = lengths["inputs"], lengths["targets"], lengths["targets"]
    forward = roofline.forward_flops(config, training.batch_size, *tokens)
    flops = (2 + trains) * forward + training.batch_size * again

    sent = 2 * parts * 2 * weights / model * (fsdp - 1) / fsdp
    if trains:
        sent += 4 * weights / model * ((fsdp - 1) / fsdp + 2 * (data - 1) / data / fsdp)
    whole = sum(layer.tokens * layer.outputs for layer in layers if not layer.is_split)
    summed = whole + sum(layer.tokens * layer.inputs for layer in layers if layer.is_split)
    if not is_kept(remat, "out"):
        summed += sum(layer.tokens * layer.outputs for layer in layers if layer.name == "out")
    sent += 2 * (model - 1) / model * 4 * rows * summed

    held = weights / (fsdp * model)
    width = 2 if training.weight_dtype == "bfloat16" else 4
    memory = held * (4 + (width + 4 if trains else 2))  # the base model; weights and their gradients
    kept = whole  # the inputs of the layers, at least half of it
    kept += sum(
        layer.tokens * layer.outputs / (model if layer.is_split else 1)
        for layer in layers
        if layer.name != _UNUSED and is_kept(remat, layer.name)
    )
    memory += 2 * rows / parts * kept
    if remat == "none":
        memory += 4 * rows / parts * _attention_weights(config, lengths) / model
    return Estimate(memory, flops / (programs.chips * chip.flops), sent / chip.links)


def _layers(shapes: Mapping[str, jax.ShapeDtypeStruct], lengths: Mapping[str, int], has_encoder: bool) -> list[_Layer]:
    """The linear layers of a model, from the shapes of its stacked kernels, `[layers, in, out]`."""
    found = []
    for path, leaf in shapes.items():
        if "/layers/" not in path or not path.endswith("/kernel"):
            continue
        name = path.split("/")[-2]
        on_inputs = path.startswith("encoder/") or ("encoder_decoder" in path and name in ("key", "value"))
        tokens = lengths["inputs" if on_inputs else "targets"] if has_encoder else sum(lengths.values())
        count, inputs, outputs = leaf.shape
        is_split = name not in ("out", "wo")
        found.append(_Layer(name, tokens, math.prod(leaf.shape), count * inputs, count * outputs, is_split))
    return found


def _attention_weights(config: object, lengths: Mapping[str, int]) -> float:
    """Attention weights of a row in all layers."""
    inputs, targets = lengths["inputs"], lengths["targets"]
    if isinstance(config, T5Config):
        decoder = config.num_decoder_layers * targets * (targets + inputs)
        return config.num_heads * (config.num_encoder_layers * inputs**2 + decoder)
    return config.num_heads * config.num_layers * (inputs + targets) ** 2  # type: ignore[attr-defined]
