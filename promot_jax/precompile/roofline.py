"""Roofline: published figures of chips, FLOPs that a model needs, what bounds a step, and checks of the counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from promot_jax.models import Config, T5Config
from promot_jax.precompile.hlo import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip (Cloud TPU's documentation of each version, November 2026)."""

    memory: int  # bytes of HBM
    flops: float  # bf16 products, per second
    bandwidth: float  # of HBM, bytes per second
    links: float  # of all links to other chips of the slice together, bytes per second in one direction
    network: float = 0.0  # to other slices, bytes per second in one direction; 0 if none is published


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1200e9, 300e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 6.4e12 / 8 / 256),  # of a pod of 256 chips together
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, 25.6e12 / 8 / 256),
}


def _kernels(config: Config, projections: int = 4) -> float:
    """Parameters of a layer's kernels: an MLP, and of T5 this many attention projections."""
    width = config.num_heads * config.head_dim
    if isinstance(config, T5Config):
        mlp = len(config.mlp_activations) + 1
        return config.emb_dim * (projections * width + mlp * config.mlp_dim)
    return config.emb_dim * (2 * (width + config.num_kv_heads * config.head_dim) + 3 * config.mlp_dim)


def forward_flops(config: Config, batch: int, inputs: int, targets: int, logits: int) -> float:
    """FLOPs of a forward pass on all devices: two per parameter and token of a linear layer, and attention's products.

    Attention counts masked positions as well, since products run over them. Per row of the batch there are `inputs`
    and `targets` tokens, prompt and padding included, and the logits of `logits` positions.
    """
    head = 2.0 * config.emb_dim * config.vocab_size * logits
    width = config.num_heads * config.head_dim
    if isinstance(config, T5Config):
        encoder = 2.0 * _kernels(config) * inputs + 4.0 * width * inputs * inputs
        decoder = 2.0 * _kernels(config, 6) * targets + 4.0 * config.emb_dim * width * inputs
        decoder += 4.0 * width * targets * (targets + inputs)
        return batch * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + head)
    length = inputs + targets
    layer = 2.0 * _kernels(config) * length + 4.0 * width * length * length
    return batch * (config.num_layers * layer + head)


def decoding_flops(config: Config, batch: int, inputs: int, steps: int, beams: int) -> float:
    """FLOPs of decoding: the inputs once, then `steps` tokens of every beam, each of which reads the whole cache."""
    rows, width = batch * beams, config.num_heads * config.head_dim
    head = 2.0 * config.emb_dim * config.vocab_size
    if isinstance(config, T5Config):
        prefill = forward_flops(dataclasses.replace(config, num_decoder_layers=0), batch, inputs, 0, 0)
        cross = 4.0 * config.emb_dim * width * inputs  # keys and values of the inputs, once
        prefill += batch * config.num_decoder_layers * cross
        layer = 2.0 * _kernels(config, 6) + 4.0 * width * (inputs + steps + 1)
        token = config.num_decoder_layers * layer + head
        return prefill + (batch + rows * (steps - 1)) * token  # the first step comes before the beams part
    prefill = forward_flops(config, batch, inputs, 0, 1)
    prefill += batch * config.num_layers * 4.0 * width * inputs * steps  # the cache has space for what follows
    token = config.num_layers * (2.0 * _kernels(config) + 4.0 * width * (inputs + steps)) + head
    return prefill + rows * (steps - 1) * token


def bounds(cost: Cost, chip: Chip, devices_per_chip: int) -> dict[str, Any]:
    """The seconds that products, memory, links and network each take at the chip's peak, and the longest of them.

    A step takes at least the longest, since compilers overlap them. A network of unknown speed is left out.
    """
    seconds = {
        "compute": (cost.flops + cost.kernel_flops) * devices_per_chip / chip.flops,
        "memory": cost.bytes * devices_per_chip / chip.bandwidth,
        "links": sum(cost.collectives.values()) * devices_per_chip / chip.links,
    }
    if cost.network and chip.network:
        seconds["network"] = cost.network * devices_per_chip / chip.network
    longest = max(seconds, key=lambda name: seconds[name])
    return {"seconds": seconds, "step_seconds": seconds[longest], "bound": longest}


def checks(
    cost: Cost,
    once: Cost,
    compiler: Mapping[str, float],
    arguments: float,
    model: float,
    devices: int,
    share: tuple[float, float],
    slices: int = 1,
    trains: bool = False,
) -> list[str]:
    """Checks the counts against others; returns what is wrong, a sentence each. Only counts that pass are shown.

    Args:
        cost: of one device, loops as often as they run.
        once: the same with every loop run once, as the compiler counts.
        compiler: its own analysis of one device: `flops`, including those outside products, and `bytes accessed`,
            including on-chip memory.
        arguments: bytes of one device's arguments, which are read at least once, except parts of embedding tables.
        model: FLOPs that the model needs, of all devices.
        devices: how many there are.
        share: how often the model's FLOPs may be computed: minimum, maximum.
        slices: how many there are.
        trains: whether weights are trained on all devices.
    """
    problems = []
    flops, traffic = compiler["flops"], compiler["bytes accessed"]
    if not 0.5 * flops <= once.flops <= 1.02 * flops:
        problems.append(f"the compiler counts {flops:.3g} FLOPs with every loop run once, and we {once.flops:.3g}")
    if once.bytes > 1.02 * traffic:
        problems.append(f"the compiler counts {traffic:.3g} bytes with every loop run once, and we {once.bytes:.3g}")
    if cost.bytes < arguments / 2:
        problems.append(f"the arguments have {arguments:.3g} bytes, and we count {cost.bytes:.3g} that are moved")
    if slices > 1 and trains and not cost.network:
        problems.append("no transfer between the slices was found, though gradients need one")
    ratio = (cost.flops + cost.kernel_flops) * devices / model
    if not share[0] <= ratio <= share[1]:
        limits = f"{share[0]:.2f} to {share[1]:.2f}"
        problems.append(f"the program computes {ratio:.2f} times what the model asks for, which should be {limits}")
    return problems


def verdict(memory: dict[str, float], chip: Chip, trains: bool) -> str:
    """Says whether the program fits on a chip, and what to change if it does not."""
    total = memory["total"]
    if total <= chip.memory:
        return f"fits: {total / GIB:.2f} of {chip.memory / GIB:.0f} GiB"
    if memory["parameters"] + memory["optimizer"] + memory["base"] > 0.7 * chip.memory:
        advice = "split the parameters further: more chips, with Partitioner.fsdp or model"
    elif trains:
        advice = 'set remat = "full" on the model, then Training.microbatches, or take more chips'
    else:
        advice = "take fewer rows at a time (BATCH_SIZE, Decoding.beams), or more chips"
    return f"does not fit: {total / GIB:.2f} of {chip.memory / GIB:.0f} GiB; {advice}"
