"""Encoder-decoder models: T5 1.0 and 1.1 (LM-adapted, Flan-T5), mT5 and ByT5, with the parameter names of T5X."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.distributed.partitioning import Partitioner, constrain
from promot_jax.errors import UserError
from promot_jax.models import layers, stack
from promot_jax.models.base import Family, Params
from promot_jax.models.batch_layout import Batch, Tokens, encoder_decoder_rows
from promot_jax.models.relative_position import RelativeBias

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5-family model. Fields that are not listed are as in `DecoderConfig`."""

    # Rows of the embedding table (T5: 32128, more than its vocabulary); ids from here on are soft-prompt rows.
    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int  # stacked on the leading axis of every encoder layer parameter
    num_decoder_layers: int  # likewise for the decoder; ByT5 has fewer of them
    head_dim: int
    mlp_dim: int
    # `("relu",)` in T5 1.0, `("gelu", "linear")` (gated; the tanh approximation) in all others.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    # Whether the head is the embedding table, with logits rescaled by `emb_dim ** -0.5` (T5 1.0).
    tied_embeddings: bool = False
    norm_eps: float = 1e-6
    relative_buckets: int = 32  # of the relative position biases, a multiple of 4
    relative_max_distance: int = 128  # larger distances share the last bucket
    max_length: int = 0  # longest sequence in tokens; 0 is no limit, since positions are relative
    # In training, as in T5X: on embeddings, attention output, MLP hidden and output, and the final norms of both
    # stacks, but not on attention weights.
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str | bool = "dots"

    def __post_init__(self) -> None:
        """Raises UserError for sizes that cannot be built."""
        layers.check_config(self)
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


class Attention(nn.Module):
    """Attention without scaling of its logits; `keys` is a method of its own, so that a cache can store its result."""

    config: T5Config

    def setup(self) -> None:
        """Declares the projections."""
        width = self.config.num_heads * self.config.head_dim
        self.query, self.key, self.value = layers.Dense(width), layers.Dense(width), layers.Dense(width)
        self.out = layers.Dense(self.config.emb_dim)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)

    def keys(self, source: Array) -> dict[str, Array]:
        """Returns `key` and `value` `[batch, heads, keys, head_dim]` of a source `[batch, keys, embed]`."""
        named = (("key", self.key), ("value", self.value))
        return {name: self._heads(dense(source)).swapaxes(1, 2) for name, dense in named}

    def __call__(self, x: Array, keys: dict[str, Array], mask: Array, bias: Array | None) -> Array:
        """Maps `[batch, length, embed]`; `mask` and `bias` as in `layers.attend`."""
        mixed = layers.attend(self._heads(self.query(x)), keys["key"], keys["value"], mask, 1.0, bias=bias)
        return self.out(mixed)


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional attention and MLP, with residuals."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, bias: Array) -> tuple[Array, None]:
        """Maps `[batch, length, embed]`; the second result is the empty output of the scan."""
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
        layer: Any,
        cross: Any,
        encoded: Any,
        mask: Array,
        bias: Array,
        cross_mask: Array,
        cursor: Any,
    ) -> tuple[tuple[Array, Any], Any]:
        """Maps the carry, `[batch, length, embed]` and the cache of all layers; see `Decoder`.

        Returns:
            The carry; and this layer's keys and values of the encoded inputs if they are new and there is a cache.
        """
        x, cache = carry
        cfg = self.config
        dropout = layers.Dropout(cfg.dropout_rate)
        attention = Attention(cfg, name="self_attention")
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_self_attention_layer_norm")(x)
        keys = attention.keys(normed)
        if cache is not None:
            cache, keys = stack.extend_cache(cache, keys, layer, cursor)
        x = x + dropout(attention(normed, keys, mask, bias))

        attention = Attention(cfg, name="encoder_decoder_attention")
        normed = layers.RMSNorm(cfg.norm_eps, name="pre_cross_attention_layer_norm")(x)
        source = attention.keys(encoded) if cross is None else cross
        x = x + dropout(attention(normed, source, cross_mask, None))

        normed = layers.RMSNorm(cfg.norm_eps, name="pre_mlp_layer_norm")(x)
        hidden = layers.Mlp(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, name="mlp")(normed)
        new_cross = source if cache is not None and cross is None else None
        return (constrain(x + dropout(hidden), *layers.STREAM), cache), new_cross


class Encoder(nn.Module):
    """All encoder layers, scanned over the leading axis of their parameters, and the final norm."""

    config: T5Config

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.relpos_bias = RelativeBias(cfg.num_heads, cfg.relative_buckets, cfg.relative_max_distance, True)
        self.layers = layers.scan_layers(EncoderLayer, cfg, cfg.num_encoder_layers, (nn.broadcast, nn.broadcast))
        self.encoder_norm = layers.RMSNorm(cfg.norm_eps)
        self.dropout = layers.Dropout(cfg.dropout_rate)

    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps `[batch, length, embed]`."""
        # Segments are contiguous, so the distance of two slots in a segment is that of their positions.
        slots = jnp.arange(x.shape[1])
        x, _ = self.layers(x, mask, self.relpos_bias(slots, slots))
        return self.dropout(self.encoder_norm(x))


class Decoder(nn.Module):
    """All decoder layers, scanned, the final norm, and an untied head."""

    config: T5Config

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.relpos_bias = RelativeBias(cfg.num_heads, cfg.relative_buckets, cfg.relative_max_distance, False)
        self.layers = layers.scan_layers(DecoderLayer, cfg, cfg.num_decoder_layers, (0, 0, *[nn.broadcast] * 5))
        self.decoder_norm = layers.RMSNorm(cfg.norm_eps)
        self.dropout = layers.Dropout(cfg.dropout_rate)
        if not cfg.tied_embeddings:
            self.logits_dense = layers.Dense(cfg.vocab_size)

    def __call__(
        self,
        x: Array,
        encoded: Array | None,
        mask: Array,
        cross_mask: Array,
        positions: Array,
        key_positions: Array,
        cache: Any = None,
        cross: Any = None,
        cursor: Any = 0,
    ) -> tuple[Array, Any, Any]:
        """Maps `[batch, length, embed]`.

        Args:
            x: embedded target tokens.
            encoded: `[batch, inputs, embed]`, or None if `cross` is given.
            mask: bool `[batch, length, length or slots]`.
            cross_mask: bool `[batch, length, inputs]`.
            positions: of the tokens, `[length]`; only differences of positions count.
            key_positions: of the keys, `[length or slots]`.
            cache: of self-attention in all layers (`models.stack`), or None.
            cross: cross-attention's `key` and `value`, alike, or None to compute them from `encoded`.
            cursor: cache slot of the first token.

        Returns:
            Final states, the extended cache, and `cross` for the next tokens (None without a cache).
        """
        bias, count = self.relpos_bias(positions, key_positions), self.config.num_decoder_layers
        layer, shared = DecoderLayer(self.config, parent=None), (encoded, mask, bias, cross_mask, cursor)
        (x, cache), new_cross = stack.run(self, layer, count, (x, cache), (cross,), shared)
        return self.dropout(self.decoder_norm(x)), cache, new_cross if cross is None else cross


class T5Module(nn.Module):
    """Embedding table, encoder, decoder and head."""

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
        """Returns the encoded inputs, `[batch, inputs, embed]`."""
        return self.encoder(self._embed(tokens, prompt), mask)

    def decode(self, tokens: Array, *arguments: Any) -> tuple[Array, Any, Any]:
        """Returns the final states of target tokens, `[batch, length, embed]`, cache and `cross`; see `Decoder`."""
        return self.decoder(self._embed(tokens, None), *arguments)

    def hidden(self, batch: Params, prompt: Array | None) -> Array:
        """Returns the states that predict the targets of a batch of `encoder_decoder_rows`."""
        source, target = batch["segment_ids"], batch["decoder_segment_ids"]
        encoded = self.encode(batch["tokens"], prompt, _same(source, source))
        slots = jnp.arange(target.shape[1])
        mask = _same(target, target) & (slots[:, None] >= slots)
        return self.decode(batch["decoder_tokens"], encoded, mask, _same(target, source), slots, slots)[0]

    def head(self, x: Array) -> Array:
        """Returns logits `[..., vocab]` in float32 of states `[..., embed]`."""
        tied = self.config.tied_embeddings
        logits = self.token_embedder.attend(x * self.config.emb_dim**-0.5) if tied else self.decoder.logits_dense(x)
        return layers.constrain_logits(logits.astype(jnp.float32))

    def __call__(self, batch: Params) -> Array:
        """Returns the logits of a batch without prompts; `init` traces this."""
        return self.head(self.hidden(batch, None))


def _same(queries: Array, keys: Array) -> Array:
    """Returns which pairs are in one segment: `[batch, queries]`, `[batch, keys]` to bool `[batch, queries, keys]`."""
    return queries[:, :, None] == keys[:, None, :]


@dataclasses.dataclass(frozen=True)
class T5Model(Family[T5Config]):
    """An encoder-decoder model with the interface of all families, `base.Family`."""

    config: T5Config
    partitioner: Partitioner | None = None

    continues = False
    shares_prefixes = False  # the encoder is bidirectional
    module_class = T5Module

    def init(self, key: Array) -> Params:
        """Returns random parameters, float32."""
        batch = encoder_decoder_rows([[Tokens([0], [0])]], 1, 1)
        flat = trees.flatten(self.module_class(self.config).init(key, batch)["params"])
        # Attention logits are not scaled: query kernels start smaller instead.
        scale = self.config.head_dim**-0.5
        return trees.unflatten({p: leaf * scale if p.endswith("query/kernel") else leaf for p, leaf in flat.items()})

    def layout(self, rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
        """Returns a training batch of this family; see `Family.layout`."""
        return encoder_decoder_rows(rows, inputs, targets)

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """Returns the states that predict the targets, `[batch, targets, embed]`; see `Family.hidden`."""
        states: Array = self._apply(params, "hidden", batch, prompt, dropout_key=dropout_key)
        return states

    def target_segments(self, batch: Params) -> Array:
        """Returns the segment of each target; see `Family.target_segments`."""
        segments: Array = batch["decoder_segment_ids"]
        return segments

    def input_rows(self, params: Params, ids: Array) -> Array:
        """Returns the input embeddings of real token ids, `[..., embed]`, float32; see `Family.input_rows`."""
        rows: Array = params["token_embedder"]["embedding"][ids]
        return rows

    def prefill(
        self, params: Params, prompt: Array | None, inputs: Params, steps: int, prefix: Params | None = None
    ) -> tuple[Array, Params]:
        """Encodes the inputs, computes cross-attention's keys and values, allocates the cache; see `Family.prefill`.

        The decoder starts with id 0 in the first slot of its cache. The state's `position` `[batch]` counts the tokens
        of each row's cache, which are in the slots before `cursor`.
        """
        assert prefix is None
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        valid = _valid(inputs)
        encoded = self._apply(params, "encode", tokens, prompt, valid[:, None, :])
        cache = self._empty_cache(params, len(tokens), 1 + steps)
        state = {"cache": cache, "cross": None, "valid": valid, "position": jnp.zeros_like(lengths)}
        return self._extend(params, {**state, "cursor": jnp.int32(0)}, jnp.zeros_like(lengths), encoded)

    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row; see `Family.step`."""
        return self._extend(params, state, tokens, None)

    def _extend(self, params: Params, state: Params, tokens: Array, encoded: Array | None) -> tuple[Array, Params]:
        cache, cursor, positions = state["cache"], state["cursor"], state["position"]
        slots = jax.tree.leaves(cache)[0].shape[-2]
        age = (cursor - jnp.arange(slots)) % slots  # steps since a slot was written, the same for all rows
        mask = (age <= positions[:, None])[:, None]  # [batch, 1, slots]
        arguments = tokens[:, None], encoded, mask, state["valid"][:, None, :], jnp.zeros(1, jnp.int32), -age
        x, cache, cross = self._apply(params, "decode", *arguments, cache, state["cross"], cursor)
        moved = {"position": positions + 1, "cursor": (cursor + 1) % slots}
        return self.head(params, x[:, 0]), {**state, "cache": cache, "cross": cross, **moved}

    def branches(
        self, params: Params, prompt: Array | None, inputs: Params, tokens: Array, prefix: Params | None = None
    ) -> tuple[Array, Array, Params]:
        """Returns the states that predict the tokens of several continuations of each input; see `Family.branches`.

        The decoder's row is all continuations, each of which attends to the encoded input and to itself.
        """
        logits, state = self.prefill(params, prompt, inputs, 0, prefix)
        batch, count, length = tokens.shape
        row = jnp.pad(tokens[:, :, :-1], ((0, 0), (0, 0), (1, 0))).reshape(batch, -1)  # each starts with id 0
        branch, slots = jnp.repeat(jnp.arange(count), length), jnp.arange(count * length)
        mask = ((branch[:, None] == branch) & (slots[:, None] >= slots))[None]
        arguments = row, None, mask, state["valid"][:, None, :], slots, slots
        x = self._apply(params, "decode", *arguments, None, state["cross"])[0]
        return x.reshape(batch, count, length, -1), logits, state

    def empty(self, params: Params, rows: int, width: int, steps: int) -> Params:
        """Returns the state of rows that nothing has been put into; see `Family.empty`."""
        cache, cross = (self._empty_cache(params, rows, slots) for slots in (1 + steps, width))
        state = {"cache": cache, "cross": cross, "valid": jnp.zeros((rows, width), bool)}
        return {**state, "position": jnp.zeros(rows, jnp.int32), "cursor": jnp.int32(0)}

    def _empty_cache(self, params: Params, rows: int, slots: int) -> Any:
        cfg = self.config
        shape = (rows, cfg.num_heads, slots, cfg.head_dim)
        return stack.empty_cache(params, cfg.num_decoder_layers, shape, cfg.dtype, self.partitioner)

    def join(self, state: Params, new: Params, rows: Array) -> Params:
        """Puts rows of a new state into a running one; see `Family.join`."""
        cursor, width = state["cursor"], state["valid"].shape[1]
        valid = stack.in_ring(new["valid"], width, 0, axis=1, fill=False)  # at the end, like the keys of the inputs
        return {
            "cache": stack.join_cache(state["cache"], new["cache"], rows, cursor),
            "cross": stack.join_cache(state["cross"], new["cross"], rows, 0),
            "valid": state["valid"].at[rows].set(valid, mode="drop"),
            "position": state["position"].at[rows].set(new["position"], mode="drop"),
            "cursor": cursor,
        }

    def move(self, state: Params, rows: Array, width: int, steps: int) -> Params:
        """Returns the state of some rows of a running one; see `Family.move`."""
        return {
            "cache": stack.move_cache(state["cache"], rows, 1 + steps, state["cursor"]),
            "cross": stack.move_cache(state["cross"], rows, width, 0),
            "valid": stack.in_ring(state["valid"][rows], width, 0, axis=1, fill=False),
            "position": state["position"][rows],
            "cursor": jnp.int32(0),
        }

    def reorder(self, state: Params, choice: Array) -> Params:
        """Returns the decoding state with its rows reordered within their groups; see `Family.reorder`."""
        caches = {"cache": state["cache"], "cross": state["cross"]}
        caches = jax.tree.map(lambda leaf: stack.take_rows(leaf, choice, axis=1), caches)
        return {
            **state,
            **caches,
            **{name: stack.take_rows(state[name], choice, axis=0) for name in ("valid", "position")},
        }


def _valid(inputs: Params) -> Array:
    """Returns which tokens are none of padding, bool `[batch, inputs]`."""
    return jnp.arange(inputs["tokens"].shape[1]) < inputs["lengths"][:, None]
