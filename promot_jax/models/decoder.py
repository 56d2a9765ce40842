"""Decoder-only models: the Llama family (grouped-query attention, rotary positions, RMSNorm, SwiGLU)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from promot_jax.errors import UserError
from promot_jax.models import layers, layouts

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-family model.

    Attributes:
        vocab_size: real tokens; ids from here on are soft-prompt rows.
        emb_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        num_layers: decoder layers, stacked on the leading axis of every layer parameter.
        head_dim: size of one head, even.
        mlp_dim: hidden size of the gated MLP.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        tied_embeddings: whether the output head is the embedding table.
        max_length: longest sequence the model was trained for, in tokens.
        dropout_rate: on embeddings, attention output, MLP hidden and output, in training only.
        dtype: of activations and products, "float32" or "bfloat16"; parameters stay float32.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    max_length: int = 8192
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for sizes that cannot be built."""
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key/value heads.")
        if self.head_dim % 2:
            raise UserError(f"Rotary positions need an even head size, not {self.head_dim}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; use 'float32' or 'bfloat16'.")


class SelfAttention(nn.Module):
    """Causal self-attention over the sequence at hand, or over a cache that it extends."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Any, cursor: Any, layer: Array
    ) -> tuple[Array, Any]:
        """Returns `[batch, length, embed]` and the extended cache of all layers (None without one)."""
        cfg = self.config
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> Array:
            return layers.Dense(count * cfg.head_dim, name=name)(x).reshape(batch, length, count, cfg.head_dim)

        query = layers.rotary(heads("query", cfg.num_heads), positions, cfg.rope_theta)
        key = layers.rotary(heads("key", cfg.num_kv_heads), positions, cfg.rope_theta)
        value = heads("value", cfg.num_kv_heads)
        if cache is not None:
            # Only the new slots are written: [layers, batch, slots, kv_heads, head_dim] stays where it is.
            at = (layer, 0, cursor, 0, 0)
            new = {"key": key, "value": value}
            cache = {name: jax.lax.dynamic_update_slice(cache[name], new[name][None], at) for name in new}
            key, value = cache["key"][layer], cache["value"][layer]
        mixed = layers.attend(query, key, value, mask, cfg.head_dim**-0.5)
        return layers.Dense(cfg.emb_dim, name="out")(mixed), cache


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Any], layer: Array, positions: Array, mask: Array, cursor: Any
    ) -> tuple[tuple[Array, Any], None]:
        """Takes `[batch, length, embed]` and the cache of all layers one layer further."""
        x, cache = carry
        cfg = self.config
        dropout = layers.Dropout(cfg.dropout_rate)
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_self_attention_layer_norm")(x)
        mixed, cache = SelfAttention(cfg, name="self_attention")(normed, positions, mask, cache, cursor, layer)
        x = x + dropout(mixed)
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_mlp_layer_norm")(x)
        hidden = layers.GatedMlp(cfg.mlp_dim, cfg.dropout_rate, name="mlp")(normed)
        return (x + dropout(hidden), cache), None


class DecoderStack(nn.Module):
    """All layers, scanned over the leading axis of their parameters, the final norm, and the head if it is not tied."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        layer = nn.remat(DecoderLayer, prevent_cse=False) if cfg.remat else DecoderLayer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.num_layers,
        )(cfg)
        self.decoder_norm = layers.RMSNorm(cfg.norm_eps)
        if not cfg.tied_embeddings:
            self.logits_dense = layers.Dense(cfg.vocab_size)

    def __call__(self, x: Array, positions: Array, mask: Array, cache: Any, cursor: Any) -> tuple[Array, Any]:
        """Maps `[batch, length, embed]`; the second result is the cache of all layers."""
        index = jnp.arange(self.config.num_layers)
        (x, cache), _ = self.layers((x, cache), index, positions, mask, cursor)
        return self.decoder_norm(x), cache

    def head(self, x: Array) -> Array:
        """Logits of an untied model."""
        return self.logits_dense(x)


class DecoderModule(nn.Module):
    """Embedding, layers and head."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim)
        self.embedding_dropout = layers.Dropout(cfg.dropout_rate)
        self.decoder = DecoderStack(cfg)

    def hidden(
        self,
        tokens: Array,
        prompt: Array | None,
        positions: Array,
        mask: Array,
        cache: Any = None,
        cursor: Any = 0,
    ) -> tuple[Array, Any]:
        """Final hidden states `[batch, length, embed]` and the extended cache."""
        x = self.embedding_dropout(self.token_embedder(tokens, prompt, jnp.dtype(self.config.dtype)))
        return self.decoder(x, positions, mask, cache, cursor)

    def head(self, x: Array) -> Array:
        """Logits `[..., vocab]` in float32 of hidden states `[..., embed]`."""
        logits = self.token_embedder.attend(x) if self.config.tied_embeddings else self.decoder.head(x)
        return logits.astype(jnp.float32)

    def __call__(self, tokens: Array) -> Array:
        """Logits of plain token ids, every position: what `init` traces."""
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (tokens.shape[0], length, length))
        x, _ = self.hidden(tokens, None, positions, mask)
        return self.head(x)


@dataclasses.dataclass(frozen=True)
class DecoderModel:
    """A decoder-only model behind the interface of all families (`promot_jax.models.Model`)."""

    config: DecoderConfig

    continues = True

    @property
    def module(self) -> DecoderModule:
        """The Linen module."""
        return DecoderModule(self.config)

    def _apply(self, params: Params, method: str, *args: Any, **rngs: Any) -> Any:
        return self.module.apply({"params": params}, *args, method=method, rngs=rngs)

    def init(self, key: Array) -> Params:
        """Random parameters, float32."""
        return self.module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def layout(self, rows: Sequence[Sequence[layouts.Tokens]], inputs: int, targets: int) -> layouts.Batch:
        """Lays sequences out as this family's training batch; see `Model.layout`."""
        return layouts.decoder_rows(rows, inputs + targets, targets)

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """States that predict the targets, `[batch, targets, embed]`; see `Model.hidden`."""
        segments = batch["segment_ids"]
        length = segments.shape[1]
        mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        x, _ = self._apply(params, "hidden", batch["tokens"], prompt, batch["positions"], mask, **rngs)
        return jnp.take_along_axis(x, batch["target_positions"][..., None], axis=1)

    def head(self, params: Params, hidden: Array) -> Array:
        """Logits `[..., vocab]`, float32, of states `[..., embed]`."""
        logits: Array = self._apply(params, "head", hidden)
        return logits

    def logits(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """Logits `[batch, targets, vocab]`, float32, at the target positions only."""
        return self.head(params, self.hidden(params, prompt, batch, dropout_key))

    def input_rows(self, params: Params, ids: Array) -> Array:
        """What the first layer reads for real token ids: `[..., embed]`, float32; what soft prompts start from."""
        rows: Array = params["token_embedder"]["embedding"][ids]
        return rows

    def prefill(self, params: Params, prompt: Array | None, inputs: Params, steps: int) -> tuple[Array, Params]:
        """Reads the inputs and makes room for `steps` more tokens; see `Model.prefill`."""
        cfg = self.config
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        batch, length = tokens.shape
        slots = jnp.arange(length + steps)
        valid = slots < lengths[:, None]  # [batch, slots]
        mask = valid[:, None, :] & (slots <= jnp.arange(length)[:, None])
        shape = (cfg.num_layers, batch, length + steps, cfg.num_kv_heads, cfg.head_dim)
        cache: Params = {"key": jnp.zeros(shape, cfg.dtype), "value": jnp.zeros(shape, cfg.dtype)}
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        x, cache = self._apply(params, "hidden", tokens, prompt, positions, mask, cache, 0)
        last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        logits = self._apply(params, "head", last)
        return logits, {"cache": cache, "valid": valid, "position": lengths, "cursor": jnp.int32(length)}

    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row: `tokens` `[batch]` to logits `[batch, vocab]` and the new state.

        New tokens share one cache slot per step for the whole batch; a row's padding before it stays masked.
        """
        cursor = state["cursor"]
        valid = state["valid"] | (jnp.arange(state["valid"].shape[1]) == cursor)
        at, mask = state["position"][:, None], valid[:, None, :]
        x, cache = self._apply(params, "hidden", tokens[:, None], None, at, mask, state["cache"], cursor)
        logits = self._apply(params, "head", x[:, 0])
        return logits, {"cache": cache, "valid": valid, "position": state["position"] + 1, "cursor": cursor + 1}

    def reorder(self, state: Params, rows: Array) -> Params:
        """The decoding state with its rows taken from `rows` `[new batch]`; see `Model.reorder`."""
        cache = {name: jnp.take(leaf, rows, axis=1) for name, leaf in state["cache"].items()}
        return {**state, "cache": cache, "valid": state["valid"][rows], "position": state["position"][rows]}
