"""Encoder-decoder models: T5 1.0 and 1.1 (LM-adapted, Flan-T5), mT5 and ByT5, under the names of T5X's T5."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.distributed.partitioning import Partitioner, constrain
from promot_jax.errors import UserError
from promot_jax.models import layers
from promot_jax.models.base import Family
from promot_jax.models.batch_layout import Batch, Tokens, encoder_decoder_rows
from promot_jax.models.relative_position import RelativeBias

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5-family model.

    Attributes:
        vocab_size: rows of the embedding table (T5: 32128, more than its vocabulary); ids from here on are
            soft-prompt rows.
        emb_dim: width of the residual stream.
        num_heads: of every attention.
        num_encoder_layers: stacked on the leading axis of every encoder layer parameter.
        num_decoder_layers: likewise; ByT5 has fewer than encoder layers.
        head_dim: size of one head.
        mlp_dim: hidden size of the MLP.
        mlp_activations: `("relu",)` in T5 1.0, `("gelu", "linear")` (gated; the tanh approximation) in all others.
        tied_embeddings: whether the head is the embedding table, with logits rescaled by `emb_dim ** -0.5` (T5 1.0).
        norm_eps: epsilon of every RMSNorm.
        relative_buckets: of the relative position biases, a multiple of 4.
        relative_max_distance: from here on, positions share the last bucket.
        max_length: longest sequence in tokens; 0 for no limit, since positions are relative.
        dropout_rate: in training only, where T5X has it: on embeddings, attention output, MLP hidden and output, and
            the final norms of both stacks. Attention weights are not dropped.
        dtype: of activations and products, "float32" or "bfloat16"; parameters stay float32.
        remat: what a layer keeps for its backward pass instead of computing it again: "none" keeps everything, "dots"
            the outputs of linear layers, "full" recomputes all of it. True and False are "full" and "none".
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tied_embeddings: bool = False
    norm_eps: float = 1e-6
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_length: int = 0
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str | bool = "none"

    def __post_init__(self) -> None:
        """Raises UserError for sizes that cannot be built."""
        object.__setattr__(self, "remat", layers.remat_policy(self.remat))
        known = sorted(layers.ACTIVATIONS)
        if not set(self.mlp_activations) <= set(known) or len(self.mlp_activations) not in (1, 2):
            raise UserError(f"mlp_activations is {self.mlp_activations}; use one or two of {known}.")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UserError(f"relative_buckets is {self.relative_buckets}; use a multiple of 4.")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"relative_max_distance is {self.relative_max_distance}; half of {self.relative_buckets} buckets hold "
                "one distance each, so that it must be larger than that half."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; use 'float32' or 'bfloat16'.")


class Attention(nn.Module):
    """Attention with its keys and values made apart, so that a cache may stand between; logits are not scaled."""

    config: T5Config

    def setup(self) -> None:
        """Declares the projections."""
        width = self.config.num_heads * self.config.head_dim
        self.query, self.key, self.value = layers.Dense(width), layers.Dense(width), layers.Dense(width)
        self.out = layers.Dense(self.config.emb_dim)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

    def keys(self, source: Array) -> dict[str, Array]:
        """`key` and `value` `[batch, keys, heads, head_dim]` of what is attended to, `[batch, keys, embed]`."""
        return {"key": self._heads(self.key(source)), "value": self._heads(self.value(source))}

    def __call__(self, x: Array, keys: dict[str, Array], mask: Array, bias: Array | None) -> Array:
        """Maps `[batch, length, embed]`; `mask` and `bias` as in `layers.attend`."""
        mixed = layers.attend(self._heads(self.query(x)), keys["key"], keys["value"], mask, 1.0, bias=bias)
        return self.out(mixed)


class EncoderLayer(nn.Module):
    """Pre-norm attention in both directions and MLP, with residuals."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array) -> tuple[Array, None]:
        """Takes `[batch, length, embed]` one layer further."""
        cfg = self.config
        dropout = layers.Dropout(cfg.dropout_rate)
        attention = Attention(cfg, name="attention")
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_attention_layer_norm")(x)
        x = x + dropout(attention(normed, attention.keys(normed), mask, bias))
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_mlp_layer_norm")(x)
        hidden = layers.Mlp(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, name="mlp")(normed)
        return constrain(x + dropout(hidden), *layers.STREAM), None


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, attention to the encoded inputs, and MLP, with residuals."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Any],
        layer: Array,
        cross: Any,
        encoded: Any,
        mask: Array,
        bias: Array,
        cross_mask: Array,
        cursor: Any,
    ) -> tuple[tuple[Array, Any], Any]:
        """Takes `[batch, length, embed]` and the cache of all layers one layer further; see `Decoder`.

        Returns:
            The carry, and this layer's keys and values of the encoded inputs where decoding starts (None elsewhere).
        """
        x, cache = carry
        cfg = self.config
        dropout = layers.Dropout(cfg.dropout_rate)
        attention = Attention(cfg, name="self_attention")
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_self_attention_layer_norm")(x)
        keys = attention.keys(normed)
        if cache is not None:
            # Only the new slots are written: [layers, batch, slots, heads, head_dim] stays where it is.
            at = (layer, 0, cursor, 0, 0)
            cache = {name: jax.lax.dynamic_update_slice(cache[name], keys[name][None], at) for name in keys}
            cache = {name: constrain(leaf, *layers.CACHE) for name, leaf in cache.items()}
            keys = {name: leaf[layer] for name, leaf in cache.items()}
        x = x + dropout(attention(normed, keys, mask, bias))

        attention = Attention(cfg, name="encoder_decoder_attention")
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_cross_attention_layer_norm")(x)
        source = attention.keys(encoded) if cross is None else cross
        x = x + dropout(attention(normed, source, cross_mask, None))

        normed = layers.RMSNorm(cfg.norm_eps, name="pre_mlp_layer_norm")(x)
        hidden = layers.Mlp(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, name="mlp")(normed)
        kept = source if cache is not None and cross is None else None
        return (constrain(x + dropout(hidden), *layers.STREAM), cache), kept


class Encoder(nn.Module):
    """All encoder layers, scanned over the leading axis of their parameters, and the final norm."""

    config: T5Config

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.relpos_bias = RelativeBias(
            cfg.num_heads, cfg.relative_buckets, cfg.relative_max_distance, bidirectional=True
        )
        self.layers = nn.scan(
            layers.remat(EncoderLayer, cfg.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=cfg.num_encoder_layers,
        )(cfg)
        self.encoder_norm = layers.RMSNorm(cfg.norm_eps)
        self.dropout = layers.Dropout(cfg.dropout_rate)

    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps `[batch, length, embed]`."""
        # Segments lie in one piece, so within each the distance of two slots is that of their positions.
        slots = jnp.arange(x.shape[1])
        x, _ = self.layers(x, mask, self.relpos_bias(slots, slots))
        return self.dropout(self.encoder_norm(x))


class Decoder(nn.Module):
    """All decoder layers, scanned, the final norm, and the head if it is not tied."""

    config: T5Config

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.relpos_bias = RelativeBias(
            cfg.num_heads, cfg.relative_buckets, cfg.relative_max_distance, bidirectional=False
        )
        self.layers = nn.scan(
            layers.remat(DecoderLayer, cfg.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, *[nn.broadcast] * 5),
            length=cfg.num_decoder_layers,
        )(cfg)
        self.decoder_norm = layers.RMSNorm(cfg.norm_eps)
        self.dropout = layers.Dropout(cfg.dropout_rate)
        if not cfg.tied_embeddings:
            self.logits_dense = layers.Dense(cfg.vocab_size)

    def __call__(
        self, x: Array, encoded: Array | None, mask: Array, cross_mask: Array, cache: Any, cross: Any, cursor: Any
    ) -> tuple[Array, Any, Any]:
        """Maps `[batch, length, embed]`.

        Args:
            x: embedded target tokens, the first of them at position `cursor`.
            encoded: `[batch, inputs, embed]`, or None where `cross` is given.
            mask: bool `[batch, length, length or slots]`.
            cross_mask: bool `[batch, length, inputs]`.
            cache: self-attention's `key` and `value` `[layers, batch, slots, heads, head_dim]`, or None.
            cross: likewise of the encoded inputs, or None to make them from `encoded`.
            cursor: the slot that the first token takes.

        Returns:
            Final states, the extended cache, and what `cross` is for the tokens that follow (None without a cache).
        """
        length = x.shape[1]
        slots = length if cache is None else cache["key"].shape[2]
        bias = self.relpos_bias(cursor + jnp.arange(length), jnp.arange(slots))
        index = jnp.arange(self.config.num_decoder_layers)
        (x, cache), made = self.layers((x, cache), index, cross, encoded, mask, bias, cross_mask, cursor)
        return self.dropout(self.decoder_norm(x)), cache, made if cross is None else cross

    def head(self, x: Array) -> Array:
        """Logits of an untied model."""
        return self.logits_dense(x)


class T5Module(nn.Module):
    """One embedding table, encoder, decoder and head."""

    config: T5Config

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim)
        self.embedding_dropout = layers.Dropout(cfg.dropout_rate)
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)

    def _embed(self, tokens: Array, prompt: Array | None) -> Array:
        return self.embedding_dropout(self.token_embedder(tokens, prompt, jnp.dtype(self.config.dtype)))

    def encode(self, tokens: Array, prompt: Array | None, mask: Array) -> Array:
        """Encoded inputs `[batch, inputs, embed]`."""
        return self.encoder(self._embed(tokens, prompt), mask)

    def decode(
        self,
        tokens: Array,
        encoded: Array | None,
        mask: Array,
        cross_mask: Array,
        cache: Any = None,
        cross: Any = None,
        cursor: Any = 0,
    ) -> tuple[Array, Any, Any]:
        """Final states `[batch, length, embed]` of target tokens; see `Decoder`."""
        return self.decoder(self._embed(tokens, None), encoded, mask, cross_mask, cache, cross, cursor)

    def hidden(self, batch: Params, prompt: Array | None) -> Array:
        """States that predict the targets of a batch of `layouts.encoder_decoder_rows`."""
        source, target = batch["segment_ids"], batch["decoder_segment_ids"]
        encoded = self.encode(batch["tokens"], prompt, _same(source, source))
        length = target.shape[1]
        mask = _same(target, target) & jnp.tril(jnp.ones((length, length), bool))
        return self.decode(batch["decoder_tokens"], encoded, mask, _same(target, source))[0]

    def head(self, x: Array) -> Array:
        """Logits `[..., vocab]` in float32 of states `[..., embed]`."""
        cfg = self.config
        logits = self.token_embedder.attend(x * cfg.emb_dim**-0.5) if cfg.tied_embeddings else self.decoder.head(x)
        return layers.constrain_logits(logits.astype(jnp.float32))

    def __call__(self, batch: Params) -> Array:
        """Logits of a batch without prompts: what `init` traces."""
        return self.head(self.hidden(batch, None))


def _same(queries: Array, keys: Array) -> Array:
    """Which pairs lie in one segment: `[batch, queries]` and `[batch, keys]` to bool `[batch, queries, keys]`."""
    return queries[:, :, None] == keys[:, None, :]


@dataclasses.dataclass(frozen=True)
class T5Model(Family):
    """An encoder-decoder model behind the interface of all families (`promot_jax.models.Model`)."""

    config: T5Config
    partitioner: Partitioner | None = None

    continues = False

    @property
    def module(self) -> T5Module:
        """The Linen module."""
        return T5Module(self.config)

    def init(self, key: Array) -> Params:
        """Random parameters, float32."""
        batch = encoder_decoder_rows([[Tokens([0], [0])]], 1, 1)
        flat = trees.flatten(self.module.init(key, batch)["params"])
        # Attention logits are not scaled: queries start small instead.
        small = self.config.head_dim**-0.5
        return trees.unflatten({p: leaf * small if p.endswith("query/kernel") else leaf for p, leaf in flat.items()})

    def layout(self, rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
        """Lays sequences out as this family's training batch; see `Model.layout`."""
        return encoder_decoder_rows(rows, inputs, targets)

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """States that predict the targets, `[batch, targets, embed]`; see `Model.hidden`."""
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        states: Array = self._apply(params, "hidden", batch, prompt, **rngs)
        return states

    def input_rows(self, params: Params, ids: Array) -> Array:
        """What the first layer reads for real token ids: `[..., embed]`, float32; what soft prompts start from."""
        rows: Array = params["token_embedder"]["embedding"][ids]
        return rows

    def prefill(self, params: Params, prompt: Array | None, inputs: Params, steps: int) -> tuple[Array, Params]:
        """Encodes the inputs once, with cross-attention's keys and values; see `Model.prefill`.

        The decoder starts from id 0 in the first slot of its cache; targets of all rows stand in the same slots.
        """
        cfg = self.config
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        valid = jnp.arange(tokens.shape[1]) < lengths[:, None]  # [batch, inputs]
        encoded = self._apply(params, "encode", tokens, prompt, valid[:, None, :])
        shape = (cfg.num_decoder_layers, len(tokens), 1 + steps, cfg.num_heads, cfg.head_dim)
        cache = {"key": jnp.zeros(shape, cfg.dtype), "value": jnp.zeros(shape, cfg.dtype)}
        state = {"cache": cache, "cross": None, "valid": valid, "cursor": jnp.int32(0)}
        return self._extend(params, state, jnp.zeros(len(tokens), jnp.int32), encoded)

    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row: `tokens` `[batch]` to logits `[batch, vocab]` and the new state."""
        return self._extend(params, state, tokens, None)

    def _extend(self, params: Params, state: Params, tokens: Array, encoded: Array | None) -> tuple[Array, Params]:
        cache, cursor = state["cache"], state["cursor"]
        mask = (jnp.arange(cache["key"].shape[2]) <= cursor)[None, None]  # [1, 1, slots]
        cross_mask = state["valid"][:, None, :]
        x, cache, cross = self._apply(
            params, "decode", tokens[:, None], encoded, mask, cross_mask, cache, state["cross"], cursor
        )
        return self.head(params, x[:, 0]), {**state, "cache": cache, "cross": cross, "cursor": cursor + 1}

    def reorder(self, state: Params, choice: Array) -> Params:
        """The decoding state with its rows chosen within their groups; see `Model.reorder`."""
        taken = {
            name: {key: layers.take_rows(leaf, choice, axis=1) for key, leaf in state[name].items()}
            for name in ("cache", "cross")
        }
        return {**state, **taken, "valid": layers.take_rows(state["valid"], choice, axis=0)}
