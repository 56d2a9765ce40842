"""What a program needs of a chip: the chips' published figures, the FLOPs a model asks for, what bounds a step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from promot_jax.models import Config, T5Config
from promot_jax.precompile.hlo import Cost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip (Cloud TPU's documentation of each version, November 2026).

    Attributes:
        memory: bytes of HBM.
        flops: bf16 products, per second.
        bandwidth: of HBM, bytes per second.
        links: of all links to other chips of a slice together, bytes per second in one direction.
        network: to other slices, bytes per second in one direction; 0 where none is published.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float
    network: float = 0.0


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1200e9, 300e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 6.4e12 / 8 / 256),  # of a pod of 256 chips together
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, 25.6e12 / 8 / 256),
}


def forward_flops(config: Config, batch: int, inputs: int, targets: int, logits: int) -> float:
    """FLOPs of a forward pass: two per parameter of a linear layer and token it sees, and the products of attention.

    Args:
        config: of the model.
        batch: rows.
        inputs: input tokens of a row, prompt included, padding too.
        targets: target tokens of a row.
        logits: positions of a row whose logits are computed.

    Returns:
        Of all devices. Attention counts what is masked as well, since products run over it.
    """
    head = 2.0 * config.emb_dim * config.vocab_size * logits
    width = config.num_heads * config.head_dim
    if isinstance(config, T5Config):
        projection = config.emb_dim * width
        mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
        encoder = 2.0 * (4 * projection + mlp) * inputs + 4.0 * width * inputs * inputs
        decoder = 2.0 * (6 * projection + mlp) * targets + 2.0 * 2 * projection * inputs
        decoder += 4.0 * width * targets * (targets + inputs)
        return batch * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + head)
    length = inputs + targets
    kernels = 2 * config.emb_dim * (width + config.num_kv_heads * config.head_dim)
    kernels += 3 * config.emb_dim * config.mlp_dim
    layer = 2.0 * kernels * length + 4.0 * width * length * length
    return batch * (config.num_layers * layer + head)


def decoding_flops(config: Config, batch: int, inputs: int, steps: int, beams: int) -> float:
    """FLOPs of decoding: the inputs once, then `steps` tokens of every beam, each seeing the whole cache."""
    rows, width = batch * beams, config.num_heads * config.head_dim
    head = 2.0 * config.emb_dim * config.vocab_size
    if isinstance(config, T5Config):
        projection = config.emb_dim * width
        mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
        read = forward_flops(dataclasses.replace(config, num_decoder_layers=0), batch, inputs, 0, 0)
        read += batch * config.num_decoder_layers * 4.0 * projection * inputs  # keys and values of the inputs, once
        token = config.num_decoder_layers * (2.0 * (6 * projection + mlp) + 4.0 * width * (inputs + steps + 1)) + head
        return read + (batch + rows * (steps - 1)) * token  # the first step comes before the beams part
    read = forward_flops(config, batch, inputs, 0, 1)
    read += batch * config.num_layers * 4.0 * width * inputs * steps  # the cache has room for what follows
    kernels = 2 * config.emb_dim * (width + config.num_kv_heads * config.head_dim)
    kernels += 3 * config.emb_dim * config.mlp_dim
    token = config.num_layers * (2.0 * kernels + 4.0 * width * (inputs + steps)) + head
    return read + rows * (steps - 1) * token


def bounds(cost: Cost, chip: Chip, devices_per_chip: int) -> dict[str, Any]:
    """The seconds that products, memory, links and the network take each, at the chip's peak, and the longest of them.

    A step takes at least the longest; compilers overlap them as far as one does not wait for another. What crosses a
    network of unknown speed is not among them.
    """
    seconds = {
        "compute": cost.flops * devices_per_chip / chip.flops,
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
    held: float,
    model: float,
    devices: int,
    share: tuple[float, float],
    slices: int = 1,
    trains: bool = False,
) -> list[str]:
    """What is wrong with a count, as sentences; nothing that a count says is shown before this list is empty.

    Args:
        cost: of one device, loops as often as they run.
        once: the same with every loop run once, which is how the compiler counts.
        compiler: its own analysis of one device: `flops`, those outside of products included, and `bytes accessed`,
            those of on-chip memory included.
        held: bytes of one device's arguments; all but parts of tables have to be read at least once, while what comes
            after may stay on the chip.
        model: FLOPs that the model asks for, of all devices.
        devices: that share the work.
        share: how often the model's FLOPs may be computed: at least, at most.
        slices: that the devices are of.
        trains: whether weights are trained on all of them.
    """
    found = []
    flops, traffic = compiler["flops"], compiler["bytes accessed"]
    if not 0.5 * flops <= once.flops <= 1.02 * flops:
        found.append(f"the compiler counts {flops:.3g} FLOPs with every loop run once, and we {once.flops:.3g}")
    if once.bytes > 1.02 * traffic:
        found.append(f"the compiler counts {traffic:.3g} bytes with every loop run once, and we {once.bytes:.3g}")
    if cost.bytes < held / 2:
        found.append(f"the arguments have {held:.3g} bytes, and we count {cost.bytes:.3g} that are read or written")
    if slices > 1 and trains and not cost.network:
        found.append("nothing is seen to cross between the slices, though gradients have to")
    ratio = cost.flops * devices / model
    if not share[0] <= ratio <= share[1]:
        found.append(
            f"the program computes {ratio:.2f} times what the model asks for, which should be "
            f"{share[0]:.2f} to {share[1]:.2f}"
        )
    return found


def verdict(memory: dict[str, float], chip: Chip, trains: bool) -> str:
    """Whether the bytes of a chip fit, and what to change where they do not."""
    total = memory["total"]
    if total <= chip.memory:
        return f"fits: {total / GIB:.2f} of {chip.memory / GIB:.0f} GiB"
    held = memory["parameters"] + memory["optimizer"] + memory["base"]
    if held > 0.7 * chip.memory:
        advice = "split the parameters further: more chips, with Partitioner.fsdp or model"
    elif trains:
        advice = 'set remat = "full" on the model, then Training.microbatches, or take more chips'
    else:
        advice = "take fewer rows at a time (BATCH_SIZE, Decoding.beams), or more chips"
    return f"does not fit: {total / GIB:.2f} of {chip.memory / GIB:.0f} GiB; {advice}"
