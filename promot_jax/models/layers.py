"""Layers of both model families: Flax Linen modules, used as pure functions of a plain dict."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import constrain
from promot_jax.errors import UserError
from promot_jax.models import attention
from promot_jax.models.stack import KEYS

Array = jax.Array

# Logical axes of the residual stream, and of queries.
STREAM = ("batch", "length", "activation_embed")
QUERIES = ("batch", "length", "heads", "head_dim")


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of `a` with one of `b`, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """Returns `x @ kernel` in the dtype of `x`, accumulated in float32, forward and backward.

    Autodiff alone would run the backward products of a bfloat16 layer in float32: half the speed or worse.
    A frozen kernel costs neither a weight gradient nor the activations that it would need.

    Args:
        x: `[..., in]`, float32 or bfloat16.
        kernel: `[in, out]`, in any float dtype; its gradient has that dtype.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    return _dot(x, kernel.astype(x.dtype), x.ndim - 1, 0).astype(x.dtype)


def _matmul_fwd(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None, Array]]:
    kept_x = x.value if kernel.perturbed else None
    kept_kernel = kernel.value if x.perturbed else None
    return matmul(x.value, kernel.value), (kept_x, kept_kernel, kernel.value[:0])


def _matmul_bwd(kept: tuple[Array | None, Array | None, Array], grad: Array) -> tuple[Array | None, Array | None]:
    x, kernel, like_kernel = kept
    dx = dkernel = None
    if kernel is not None:
        dx = _dot(grad, kernel.astype(grad.dtype), grad.ndim - 1, 1).astype(grad.dtype)
    if x is not None:
        dkernel = _dot(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), 0, 0).astype(like_kernel.dtype)
    return dx, dkernel


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


def keep(x: Array, name: str) -> Array:
    """Returns `x`, which a layer keeps for its backward pass if its policy names it.

    On a CPU bfloat16 is kept as its bits: where a loop stacks it, XLA would convert the stack of all layers to float32
    and back at every layer (as it does with the layers' inputs, which are kept in any case and are a ninth of it).
    """
    cpu = partitioning.device_of(partitioning.active()).platform == "cpu"
    return _keep_bits(x, name) if cpu and x.dtype == jnp.bfloat16 else checkpoint_name(x, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _keep_bits(x: Array, name: str) -> Array:
    return _named_bits(x, name)


def _named_bits(x: Array, name: str) -> Array:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


# Not `_keep_bits` again: a policy does not look into a function that has its own derivative.
_keep_bits.defvjp(lambda x, name: (_named_bits(x, name), None), lambda _, __, grad: (grad,))


# What a layer keeps for its backward pass beside its input, by policy: checkpoint names, of linear layers their own.
_KEPT: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "out", attention.SAVED),
    "mlp": ("wi", "wi_0", "wi_1", "wo"),
    "full": (),
}
_KEPT["dots"] = _KEPT["attention"] + _KEPT["mlp"]
REMAT = ("none", "dots", "attention", "mlp", "full")


def is_kept(remat: str, name: str) -> bool:
    """Says whether a remat policy keeps the output of the linear layer of this name, rather than computing it again."""
    return remat == "none" or name in _KEPT[remat]


def check_config(config: Any) -> None:
    """Checks the fields that the configs of all families share; replaces `remat` of True and False by its name.

    Raises:
        UserError: an unknown remat policy or dtype.
    """
    if isinstance(config.remat, bool):  # in older configs
        object.__setattr__(config, "remat", "full" if config.remat else "none")
    if config.remat not in REMAT:
        raise UserError(f"remat is {config.remat!r}; use one of {', '.join(map(repr, REMAT))}.")
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {config.dtype!r}; use 'float32' or 'bfloat16'.")


def scan_layers(layer: type[nn.Module], config: Any, count: int, in_axes: tuple[Any, ...]) -> Any:
    """Returns a stack of `count` layers, scanned over the leading axis of their parameters.

    Args:
        layer: Linen module of one layer, built from the config.
        config: of the model. Its `remat` says what a layer keeps for the backward pass: "none" all activations, "dots"
            the outputs of linear layers, "attention" and "mlp" only those of that part, "full" only the layer's input.
        count: of layers.
        in_axes: of the layer's arguments after the carry, as for `nn.scan`.
    """
    if config.remat != "none":
        kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[config.remat])
        layer = nn.remat(layer, prevent_cse=False, policy=kept)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=count,
    )(config)


class Dense(nn.Module):
    """Linear layer with T5X's names and layout: `kernel` `[in, out]` and an optional `bias` `[out]`, both float32.

    If LoRA parameters lie beside the kernel (`promot_jax.params.lora.attach`), their update is added.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., out]` in the dtype of `x`."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = keep(matmul(x, kernel), str(self.name))
        if self.has_variable("params", "lora_a"):
            y += matmul(matmul(x, self.get_variable("params", "lora_a")), self.get_variable("params", "lora_b"))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, times `scale + offset`: Gemma stores scales around zero."""

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of `[..., embed]`, keeping its dtype."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32).astype(jnp.float32) + self.offset
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * scale).astype(x.dtype)


class Embed(nn.Module):
    """Token embedding; ids from `vocab_size` on are the virtual ids of soft prompts.

    A lookup multiplies rows of the table by `scale` (Gemma), but not rows of a prompt.
    """

    vocab_size: int
    features: int
    scale: float = 1.0

    def setup(self) -> None:
        """Declares `embedding` `[vocab, embed]`."""
        init = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, ids: Array, prompt: Array | None, dtype: Any) -> Array:
        """Looks ids up: below `vocab_size` in the model's table, the rest in `prompt`.

        Args:
            ids: `[batch, length]`.
            prompt: `[prompt rows, embed]`, or None for the plain model.
            dtype: of the result.

        Returns:
            `[batch, length, embed]`.
        """
        scale = jnp.asarray(self.scale, dtype)  # rounded to the dtype first, as in Gemma's code

        def look_up(ids: Array) -> Array:
            rows = _rows(self.embedding, constrain(ids, "looked_up", "length")).astype(dtype)
            return constrain(constrain(rows, "looked_up", "length", "embed"), *STREAM) * scale

        if prompt is None:
            return look_up(ids)
        real = look_up(jnp.minimum(ids, self.vocab_size - 1))
        virtual = prompt[jnp.clip(ids - self.vocab_size, 0, prompt.shape[0] - 1)].astype(dtype)
        return constrain(jnp.where((ids < self.vocab_size)[..., None], real, virtual), *STREAM)

    def attend(self, x: Array) -> Array:
        """Returns the products of `[..., embed]` with every row of the table (tied head): `[..., vocab]`."""
        return matmul(x, self.embedding.T)


def _rows(table: Array, ids: Array) -> Array:
    return table[ids] if table.dtype == jnp.float32 else _rows_summed_in_float32(table, ids)


@jax.custom_vjp
def _rows_summed_in_float32(table: Array, ids: Array) -> Array:
    """Looks up rows of a bfloat16 table; summed in bfloat16, the gradient of a frequent token would stop growing."""
    return table[ids]


def _rows_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[ids], (table, ids)


def _rows_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = kept
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32)).astype(table.dtype), None


_rows_summed_in_float32.defvjp(_rows_forward, _rows_backward)


def rotary_frequencies(
    head_dim: int, theta: float, factor: float = 1.0, low_turns: float = 0.0, high_turns: float = 0.0, length: int = 0
) -> Array:
    """Returns the frequencies of the rotary angles, `[head_dim / 2]` float32, in radians per position.

    Args:
        head_dim: size of one head.
        theta: base of the frequencies.
        factor: divisor of the frequencies, which extends a model to longer contexts.
        low_turns: frequencies with fewer turns within `length` are divided by the whole factor (Llama 3.1).
        high_turns: frequencies with more turns are not divided; between the two, the division fades out.
        length: context length before the extension; 0 divides all frequencies (linear scaling).
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not length:
        return frequency / factor
    turns = length * frequency / (2 * math.pi)
    weight = jnp.clip((turns - low_turns) / (high_turns - low_turns), 0.0, 1.0)
    return weight * frequency + (1 - weight) * frequency / factor


def rotation(positions: Array, frequency: Array) -> tuple[Array, Array]:
    """Returns cosine and sine of the rotary angles, float32 `[batch, length, 1, head_dim / 2]`.

    Args:
        positions: `[batch, length]`.
        frequency: of `rotary_frequencies`.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `[batch, length, heads, head_dim]` by the angles of `rotation`, in float32.

    The layout is the half-split one of Llama (Su et al., 2021).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def softcap(x: Array, cap: float) -> Array:
    """Maps values smoothly into `(-cap, cap)`; 0 leaves them unchanged."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    query: Array, key: Array, value: Array, mask: Array, scale: float, *, bias: Array | None = None, cap: float = 0.0
) -> Array:
    """Computes grouped-query attention in float32; each group of query heads shares one key/value head.

    Args:
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`, which the products read as it lies in a cache.
        value: as `key`.
        mask: bool `[batch, length, keys]`, True for the keys that a query attends to.
        scale: of the logits; 1.0 in the T5 family.
        bias: added to the scaled logits, `[batch or 1, heads, length, keys]` float32, or None.
        cap: of the scaled logits (`softcap`), 0 for none.

    Returns:
        `[batch, length, heads * head_dim]`.
    """
    query, key, value = constrain(query, *QUERIES), constrain(key, *KEYS), constrain(value, *KEYS)
    batch, length, heads, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    # One plain batched product per key/value head, [batch, kv_heads, group * length, ...]: backends run it best.
    rows = query.astype(jnp.float32).reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, head_dim)
    logits = softcap(jnp.einsum("bhqd,bhkd->bhqk", rows, key.astype(jnp.float32)) * scale, cap)
    logits = logits.reshape(batch, kv_heads, group, length, keys)
    if bias is not None:
        logits += bias.reshape(-1, kv_heads, group, length, keys)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = weights.reshape(batch, kv_heads, group * length, keys) @ value.astype(jnp.float32)
    mixed = mixed.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return constrain(mixed.reshape(batch, length, heads * head_dim).astype(query.dtype), "batch", "length", "joined_kv")


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,  # the tanh approximation, as in all published models
    "silu": nn.silu,
    "linear": lambda x: x,
}


def constrain_logits(logits: Array) -> Array:
    """Shards `[batch, ..., vocab]` along batch and vocabulary."""
    return constrain(logits, "batch", *["length"] * (logits.ndim - 2), "vocab")


class Mlp(nn.Module):
    """`wo(activation(wi x))` for one activation, `wo(first(wi_0 x) * second(wi_1 x))` for two (gated)."""

    mlp_dim: int
    activations: tuple[str, ...]
    dropout_rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., embed]` to `[..., embed]`."""
        names = ["wi"] if len(self.activations) == 1 else [f"wi_{i}" for i in range(len(self.activations))]
        parts = [
            ACTIVATIONS[activation](constrain(Dense(self.mlp_dim, name=name)(x), "batch", "length", "mlp"))
            for name, activation in zip(names, self.activations, strict=True)
        ]
        return Dense(x.shape[-1], name="wo")(Dropout(self.dropout_rate)(math.prod(parts[1:], start=parts[0])))


class Dropout(nn.Module):
    """Dropout that is on if the caller gives a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Drops entries of `[...]`."""
        return nn.Dropout(self.rate)(x, deterministic=not self.has_rng("dropout"))
