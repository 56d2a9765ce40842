"""Layers both model families are built from: Flax Linen modules used as pure functions of a plain dict."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from promot_jax.distributed.partitioning import constrain
from promot_jax.errors import UserError

Array = jax.Array

# Logical axes of the residual stream, and of queries, keys and values apart.
STREAM = ("batch", "length", "activation_embed")
QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", "length", "kv_heads", "head_dim")
CACHE = ("layers", *KEYS)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Product over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """`x @ kernel` in the dtype of `x`, accumulated in float32, forward and backward.

    Autodiff alone would run the backward products of a bfloat16 layer in float32: half the speed or worse.
    A frozen kernel costs neither a weight gradient nor the activations one would need.

    Args:
        x: `[..., in]`, float32 or bfloat16.
        kernel: `[in, out]`, in any float dtype; its gradient comes back in that dtype.

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
        rows = _dot(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), 0, 0)
        dkernel = rows.astype(like_kernel.dtype)
    return dx, dkernel


matmul.defvjp(_matmul_fwd, _matmul_bwd, symbolic_zeros=True)


PRODUCT = "product"  # what `remat` calls the output of a linear layer
REMAT = ("none", "dots", "full")


def remat(layer: type[nn.Module], policy: str | bool) -> type[nn.Module]:
    """A layer that keeps less for its backward pass and computes the rest again.

    Args:
        layer: of a scanned stack.
        policy: "none" keeps all activations, "dots" the outputs of linear layers, "full" the layer's input alone.
    """
    if policy == "none":
        return layer
    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT) if policy == "dots" else None
    return nn.remat(layer, prevent_cse=False, policy=kept)


def remat_policy(given: str | bool) -> str:
    """The policy that a config names; a bool is "full" or "none", as in configs of old.

    Raises:
        UserError: no such policy.
    """
    policy = {True: "full", False: "none"}.get(given, given) if isinstance(given, bool) else given
    if policy not in REMAT:
        raise UserError(f"remat is {policy!r}; use one of {', '.join(map(repr, REMAT))}.")
    return policy


class Dense(nn.Module):
    """Linear layer in T5X's names and layout: `kernel` `[in, out]` and, if asked for, `bias` `[out]`, both float32.

    Where LoRA lies beside the kernel (`promot_jax.params.lora.attach`), its update is added.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., out]` in the dtype of `x`."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = checkpoint_name(matmul(x, kernel), PRODUCT)
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
    """Token embedding, with soft prompts as the virtual ids behind the vocabulary.

    Rows of the table are multiplied by `scale` as they are looked up (Gemma); those of a prompt are taken as they are.
    """

    vocab_size: int
    features: int
    scale: float = 1.0

    def setup(self) -> None:
        """Declares `embedding` `[vocab, embed]`."""
        init = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, ids: Array, prompt: Array | None, dtype: Any) -> Array:
        """Looks ids up: below `vocab_size` in the model's own table, the rest in `prompt`.

        Args:
            ids: `[batch, length]`.
            prompt: `[prompt rows, embed]`, or None for the plain model.
            dtype: of the result.

        Returns:
            `[batch, length, embed]`.
        """
        # Rounded to the dtype first, as Gemma's own code does.
        scale = jnp.asarray(self.scale, dtype)

        def look_up(ids: Array) -> Array:
            rows = _rows(self.embedding, constrain(ids, "looked_up", "length")).astype(dtype)
            return constrain(constrain(rows, "looked_up", "length", "embed"), *STREAM) * scale

        if prompt is None:
            return look_up(ids)
        real = look_up(jnp.minimum(ids, self.vocab_size - 1))
        virtual = prompt[jnp.clip(ids - self.vocab_size, 0, prompt.shape[0] - 1)].astype(dtype)
        return constrain(jnp.where((ids < self.vocab_size)[..., None], real, virtual), *STREAM)

    def attend(self, x: Array) -> Array:
        """Scores `[..., embed]` against every row of the table (tied head): `[..., vocab]`."""
        return matmul(x, self.embedding.T)


def _rows(table: Array, ids: Array) -> Array:
    return table[ids] if table.dtype == jnp.float32 else _rows_summed_in_float32(table, ids)


@jax.custom_vjp
def _rows_summed_in_float32(table: Array, ids: Array) -> Array:
    """Rows of a table in bfloat16; in it, the gradient of a frequent token would stop growing."""
    return table[ids]


def _rows_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[ids], (table, ids)


def _rows_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = kept
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32)).astype(table.dtype), None


_rows_summed_in_float32.defvjp(_rows_forward, _rows_backward)


def rotary_frequencies(
    head_dim: int,
    theta: float,
    factor: float = 1.0,
    low_turns: float = 0.0,
    high_turns: float = 0.0,
    original_length: int = 0,
) -> Array:
    """Frequencies of the rotary angles, `[head_dim / 2]` float32, in radians per position.

    Args:
        head_dim: size of one head.
        theta: base of the frequencies.
        factor: they are divided by it, which stretches a model to longer contexts.
        low_turns: only frequencies that turn less often than this within the original length are divided in full
            (Llama 3.1).
        high_turns: those that turn more often than this stay as they are; in between, the division fades out.
        original_length: that the model was trained for before it was stretched; 0 divides all alike (linear scaling).
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not original_length:
        return frequency / factor
    turns = original_length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low_turns) / (high_turns - low_turns), 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / factor


def rotation(positions: Array, frequency: Array) -> tuple[Array, Array]:
    """Cosine and sine of every rotary angle, float32.

    Args:
        positions: `[batch, length]`.
        frequency: of `rotary_frequencies`.

    Returns:
        Two arrays `[batch, length, 1, head_dim / 2]`.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions in the half-split layout of Llama (Su et al., 2021), computed in float32.

    Args:
        x: `[batch, length, heads, head_dim]`.
        cos: of `rotation`.
        sin: of `rotation`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def softcap(x: Array, cap: float) -> Array:
    """Squeezes values smoothly into `(-cap, cap)`; 0 leaves them as they are."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    query: Array, key: Array, value: Array, mask: Array, scale: float, *, bias: Array | None = None, cap: float = 0.0
) -> Array:
    """Grouped-query attention; every group of query heads shares one key/value head; in float32.

    Args:
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, keys, kv_heads, head_dim]`.
        value: as `key`.
        mask: bool `[batch, length, keys]`, True where attention is allowed.
        scale: of the logits; 1.0 in the T5 family.
        bias: added to the scaled logits, `[batch or 1, heads, length, keys]` float32, or None.
        cap: of the scaled logits (`softcap`), 0 for none.

    Returns:
        `[batch, length, heads * head_dim]`.
    """
    query, key, value = constrain(query, *QUERIES), constrain(key, *KEYS), constrain(value, *KEYS)
    batch, length, heads, head_dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    # One plain batched product per key/value head, [batch, kv_heads, group * length, ...]: backends run it best.
    rows = query.astype(jnp.float32).reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, head_dim)
    logits = softcap(rows @ key.astype(jnp.float32).transpose(0, 2, 3, 1) * scale, cap)
    logits = logits.reshape(batch, kv_heads, group, length, -1)
    if bias is not None:
        logits += bias.reshape(-1, kv_heads, group, length, key.shape[1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = weights.reshape(batch, kv_heads, group * length, -1) @ value.astype(jnp.float32).transpose(0, 2, 1, 3)
    mixed = mixed.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return constrain(mixed.reshape(batch, length, heads * head_dim).astype(query.dtype), "batch", "length", "joined_kv")


def take_rows(leaf: Array, choice: Array, axis: int) -> Array:
    """Rows of a decoding state along its batch axis, `groups * old` of them; see `Model.reorder` for `choice`."""
    groups, new = choice.shape
    before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
    rows = leaf.reshape(*before, groups, -1, *after)
    index = choice.reshape(*[1] * axis, groups, new, *[1] * len(after))
    return jnp.take_along_axis(rows, index, axis=axis + 1).reshape(*before, groups * new, *after)


# "gelu" is its tanh approximation, as in all published models.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "linear": lambda x: x,
}


def constrain_logits(logits: Array) -> Array:
    """Splits `[batch, ..., vocab]` over both ends."""
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
    """Dropout that is on exactly when the caller gives a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Drops entries of an array of any shape."""
        return nn.Dropout(self.rate)(x, deterministic=not self.has_rng("dropout"))
