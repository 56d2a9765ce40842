"""Attention kernels of accelerators, splash attention on TPUs and cuDNN's on GPUs, and which one runs.

`layers.attend` (XLA) is the reference. A kernel computes the same for plain causal rows: a query attends to the keys of
its own segment, up to its own slot, within a window if there is one. It never holds the `[length, length]` weights in
memory. Decoding steps, and rows whose mask is another one, run by `layers.attend`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError

Array = jax.Array

ATTENTION = ("auto", "xla", "cudnn", "splash")
SAVED = "attention"  # checkpoint name of what the splash kernel's backward pass needs of its forward pass
_PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}
_LANES = 128  # of a TPU's vector registers: splash takes rows of a multiple of this many tokens
_BLOCK = 512  # tokens of the largest block


def platform_kernel(setting: str, partitioner: Partitioner | None) -> str:
    """Returns what computes attention on the devices of a partitioner where nothing is in its way.

    Args:
        setting: one of `ATTENTION`; "auto" is the platform's kernel.
        partitioner: None for the devices of this run.

    Returns:
        "xla", "cudnn" or "splash".

    Raises:
        UserError: a kernel was asked for by name that this platform does not have.
    """
    platform = partitioning.device_of(partitioner).platform
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if setting == "auto" else setting
    if kernel != "xla" and platform not in _PLATFORMS[kernel]:
        raise UserError(
            f"attention is {kernel!r}, which runs on {_PLATFORMS[kernel][0].upper()}s alone, and the devices here are "
            f"{platform}; use 'auto'."
        )
    return kernel


def choose(setting: str, query: Array, key: Array, cap: float) -> str:
    """Returns what computes attention of these arrays on the active mesh; prints once why it is not the kernel.

    Args:
        setting: see `platform_kernel`.
        query: `[batch, length, heads, head_dim]`; only its shape and dtype count.
        key: `[batch, length, kv_heads, head_dim]`, likewise.
        cap: soft cap of the logits, 0 for none.

    Returns:
        "xla", "cudnn" or "splash".

    Raises:
        UserError: see `platform_kernel`.
    """
    partitioner = partitioning.active()
    kernel = platform_kernel(setting, partitioner)
    if kernel == "xla":
        return "xla"
    obstacle = _mesh_obstacle(query, key)
    if kernel == "cudnn":
        obstacle = obstacle or _cudnn_obstacle(partitioning.device_of(partitioner), query, cap)
    elif setting == "auto" and query.shape[1] < _LANES:
        obstacle = obstacle or f"rows of {query.shape[1]} tokens are shorter than a block of {_LANES}"
    if obstacle:
        _print_once(f"Attention runs by XLA, not by {kernel}: {obstacle}.")
        return "xla"
    return kernel


def attend(
    kernel: str,
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    scale: float,
    *,
    cap: float = 0.0,
    window: int = 0,
    is_local: Array | None = None,
) -> Array:
    """Causal attention within segments by a kernel, on the mesh of the active partitioner.

    Args:
        kernel: "cudnn" or "splash", as `choose` says.
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, length, kv_heads, head_dim]`.
        value: as `key`.
        segments: int32 `[batch, length]`.
        scale: of the logits.
        cap: soft cap of the scaled logits, 0 for none.
        window: tokens that a local layer attends to, the query's own included; 0 for none.
        is_local: bool scalar, whether the window counts in this layer; None if there is no window.

    Returns:
        `[batch, length, heads * head_dim]`.
    """

    def run(window: int) -> Array:
        if kernel == "cudnn":
            call = functools.partial(cudnn, scale=scale, window=window)
        else:
            interpret = partitioning.device_of(partitioning.active()).platform == "cpu"
            call = functools.partial(splash, scale=scale, cap=cap, window=window, interpret=interpret)
        return _on_mesh(call, query, key, value, segments)

    if is_local is None or window >= query.shape[1]:
        mixed = run(0)
    else:
        mixed = jax.lax.cond(is_local, lambda: run(window), lambda: run(0))
    return partitioning.constrain(mixed.reshape(*mixed.shape[:2], -1), "batch", "length", "joined_kv")


def splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    *,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    interpret: bool = False,
) -> Array:
    """Pallas' splash attention of one device; arguments and result as those of `cudnn`, and see `attend`.

    `interpret` runs the kernel on a CPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = query.shape[1:3]
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query, key, value, segments = (_padded(x, _LANES) for x in (query, key, value, segments))
    rows = segments.shape[1]
    if window and window < rows:
        mask: Any = splash_attention_mask.LocalMask((rows, rows), (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask((rows, rows))
    block = max(size for size in range(_LANES, min(rows, _BLOCK) + 1, _LANES) if rows % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    run = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        attn_logits_soft_cap=cap or None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    ids = splash_attention_kernel.SegmentIds(segments, segments)
    mixed = jax.vmap(run)(*(x.swapaxes(1, 2) for x in (query, key, value)), ids)
    return mixed.swapaxes(1, 2)[:, :length]


def cudnn(query: Array, key: Array, value: Array, segments: Array, *, scale: float, window: int = 0) -> Array:
    """Flash attention by cuDNN on one device, in bfloat16.

    Args:
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, length, kv_heads, head_dim]`.
        value: as `key`.
        segments: int32 `[batch, length]`.
        scale: of the logits.
        window: see `attend`.

    Returns:
        `[batch, length, heads, head_dim]`.
    """
    length = query.shape[1]
    query, key, value, segments = (_padded(x, 2) for x in (query, key, value, segments))  # the mask wants it even
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=(segments[:, :, None] == segments[:, None, :])[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return mixed[:, :length]


def _padded(x: Array, multiple: int) -> Array:
    """Pads `[batch, length, ...]` with zeros to a multiple; segment 0 is that of padding."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)])


def _axes() -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Mesh axes of the batch and of the heads, and the sizes of all axes; all empty without a mesh."""
    partitioner = partitioning.active()
    if partitioner is None or partitioner.mesh().size == 1:
        return (), (), {}
    table = partitioner.table()
    batch = table["batch"]
    heads = tuple(name for name in table.get("heads", ()) if name not in batch)
    return batch, heads, dict(partitioner.mesh().shape)


def _mesh_obstacle(query: Array, key: Array) -> str:
    """Says why the arrays cannot be split over the mesh as a kernel wants them, "" if they can."""
    batch, heads, sizes = _axes()
    partitioner = partitioning.active()
    if sizes and partitioner is not None and partitioner.table().get("length"):
        return "Partitioner.axis_rules split the axis 'length'"
    if query.shape[0] % (parts := math.prod(sizes[name] for name in batch)):
        return f"{query.shape[0]} rows do not divide over {parts} devices"
    ways = math.prod(sizes[name] for name in heads)
    if query.shape[2] % (key.shape[2] * _copies(key.shape[2], ways)):
        return f"{query.shape[2]} heads do not divide over {ways} devices"
    return ""


def _copies(kv_heads: int, ways: int) -> int:
    """How often each key/value head is repeated, so that the heads divide over devices."""
    return ways // math.gcd(kv_heads, ways)


def _cudnn_obstacle(device: Any, query: Array, cap: float) -> str:
    if "cuda" not in device.client.platform_version.lower():
        return "the GPU is not one of NVIDIA's"
    head_dim = query.shape[-1]
    largest = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    if query.dtype != jnp.bfloat16:
        return f"cuDNN takes bfloat16, not {query.dtype} (Experiment.dtype)"
    if cap:
        return "cuDNN has no soft cap"
    if head_dim % 8 or head_dim > largest:
        return f"cuDNN takes heads of a multiple of 8 up to {largest}, not {head_dim}"
    return ""


def _on_mesh(call: Any, query: Array, key: Array, value: Array, segments: Array) -> Array:
    """Calls a kernel on each device's rows and heads."""
    batch, heads, sizes = _axes()
    if not sizes:
        return call(query, key, value, segments)
    copies = _copies(key.shape[2], math.prod(sizes[name] for name in heads))
    if copies > 1:
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    partitioner = partitioning.active()
    assert partitioner is not None
    rows = PartitionSpec(batch, None, heads, None)
    spread = jax.shard_map(
        call,
        mesh=partitioner.mesh(),
        in_specs=(rows, rows, rows, PartitionSpec(batch, None)),
        out_specs=rows,
        check_vma=False,  # a kernel does not say how its results vary over the mesh
    )
    return spread(query, key, value, segments)


@functools.cache
def _print_once(message: str) -> None:
    print(message, flush=True)
