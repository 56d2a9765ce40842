"""Layers both model families are built from: Flax Linen modules used as pure functions of a plain dict."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


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


class Dense(nn.Module):
    """Linear layer without bias; T5X's name and layout: `kernel` `[in, out]`, float32 master weights."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., out]` in the dtype of `x`."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        return matmul(x, kernel)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of `[..., embed]`, keeping its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


class Embed(nn.Module):
    """Token embedding, with soft prompts as the virtual ids behind the vocabulary."""

    vocab_size: int
    features: int

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
        if prompt is None:
            return self.embedding[ids].astype(dtype)
        real = self.embedding[jnp.minimum(ids, self.vocab_size - 1)].astype(dtype)
        virtual = prompt[jnp.clip(ids - self.vocab_size, 0, prompt.shape[0] - 1)].astype(dtype)
        return jnp.where((ids < self.vocab_size)[..., None], real, virtual)

    def attend(self, x: Array) -> Array:
        """Scores `[..., embed]` against every row of the table (tied head): `[..., vocab]`."""
        return matmul(x, self.embedding.T)


def rotary(x: Array, positions: Array, theta: float) -> Array:
    """Rotary positions in the half-split layout of Llama (Su et al., 2021), computed in float32.

    Args:
        x: `[batch, length, heads, head_dim]`.
        positions: `[batch, length]`.
        theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array, scale: float) -> Array:
    """Grouped-query attention; every group of query heads shares one key/value head; in float32.

    Args:
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, keys, kv_heads, head_dim]`.
        value: as `key`.
        mask: bool `[batch, length, keys]`, True where attention is allowed.
        scale: of the logits; 1.0 in the T5 family.

    Returns:
        `[batch, length, heads * head_dim]`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    # One plain batched product per key/value head, [batch, kv_heads, group * length, ...]: backends run it best.
    rows = query.astype(jnp.float32).reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, head_dim)
    logits = rows @ key.astype(jnp.float32).transpose(0, 2, 3, 1) * scale
    logits = logits.reshape(batch, kv_heads, group, length, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = weights.reshape(batch, kv_heads, group * length, -1) @ value.astype(jnp.float32).transpose(0, 2, 1, 3)
    mixed = mixed.reshape(batch, kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * head_dim).astype(query.dtype)


class Dropout(nn.Module):
    """Dropout that is on exactly when the caller gives a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Drops entries of an array of any shape."""
        return nn.Dropout(self.rate)(x, deterministic=not self.has_rng("dropout"))


class GatedMlp(nn.Module):
    """`wo(activation(wi_0 x) * wi_1 x)`: SwiGLU."""

    mlp_dim: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., embed]` to `[..., embed]`."""
        hidden = nn.silu(Dense(self.mlp_dim, name="wi_0")(x)) * Dense(self.mlp_dim, name="wi_1")(x)
        return Dense(x.shape[-1], name="wo")(Dropout(self.dropout_rate)(hidden))
