"""Decoder-only models: Llama, Gemma 2 and 3 (text), Qwen 2.5 and 3, as one module; the config holds the differences.

All have grouped-query attention, rotary positions, RMSNorm and a gated MLP. Some add biases or norms of queries and
keys, norms after each block, scaled embeddings, soft caps, or layers that attend to a sliding window.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from promot_jax.distributed.partitioning import Partitioner, constrain
from promot_jax.models import attention, layers, stack
from promot_jax.models.base import Family, Params
from promot_jax.models.batch_layout import Batch, Tokens, decoder_rows
from promot_jax.models.decoder_config import DecoderConfig

Array = jax.Array

_EMPTY = 1 << 30  # position of an empty cache slot: later than any query's


class View(NamedTuple):
    """The attention mask and rotary angles of a layer, global or local."""

    mask: Array  # bool `[batch, length, keys]`
    cos: Array  # of the rotary angles, `[batch, length, 1, head_dim / 2]`
    sin: Array  # of the rotary angles, `[batch, length, 1, head_dim / 2]`
    # int32 `[batch, length]` if the mask says no more than: keys of the query's segment up to the query's own slot, and
    # within the window of a local layer; a kernel may then compute it. None for other masks, and where keys are cached.
    segments: Array | None = None
    is_local: Array | None = None  # bool scalar; None in models without a window


class SelfAttention(nn.Module):
    """Causal self-attention over the given sequence, or over a cache that it extends."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, view: View, cache: Any, cursor: Any, layer: Any) -> tuple[Array, Any]:
        """Returns `[batch, length, embed]` and the extended cache of all layers (None without one)."""
        cfg = self.config
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> Array:
            flat = layers.Dense(count * cfg.head_dim, use_bias=cfg.qkv_bias, name=name)(x)
            return flat.reshape(batch, length, count, cfg.head_dim)

        query, key = heads("query", cfg.num_heads), heads("key", cfg.num_kv_heads)
        value = heads("value", cfg.num_kv_heads)
        if cfg.qk_norm:
            query, key = cfg.norm("query_norm")(query), cfg.norm("key_norm")(key)
        query, key = layers.rotary(query, view.cos, view.sin), layers.rotary(key, view.cos, view.sin)
        # [batch, kv_heads, length, head_dim], as in the cache
        keys: Any = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
        if cache is not None:
            cache, keys = stack.extend_cache(cache, keys, layer, cursor)
        scale = cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale
        cap = cfg.attention_softcap
        kernel = "xla" if view.segments is None else attention.choose(cfg.attention, query, key, cap)
        if view.segments is None or kernel == "xla":
            mixed = layers.attend(query, keys["key"], keys["value"], view.mask, scale, cap=cap)
        else:
            bounds: Any = {"cap": cap, "window": cfg.window, "is_local": view.is_local}
            mixed = attention.attend(kernel, query, key, value, view.segments, scale, **bounds)
        return layers.Dense(cfg.emb_dim, name="out")(mixed), cache


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Any], layer: Any, is_global: Array, wide: View, local: View | None, cursor: Any
    ) -> tuple[tuple[Array, Any], None]:
        """Maps the carry, `[batch, length, embed]` and the cache of all layers; see `DecoderStack`."""
        x, cache = carry
        cfg = self.config
        dropout = layers.Dropout(cfg.dropout_rate)
        view = wide if local is None else jax.tree.map(partial(jnp.where, is_global), wide, local)
        normed = cfg.norm("pre_self_attention_layer_norm")(x)
        mixed, cache = SelfAttention(cfg, name="self_attention")(normed, view, cache, cursor, layer)
        if cfg.post_norms:
            mixed = cfg.norm("post_self_attention_layer_norm")(mixed)
        x = x + dropout(mixed)
        normed = cfg.norm("pre_mlp_layer_norm")(x)
        hidden = layers.Mlp(cfg.mlp_dim, (cfg.activation, "linear"), cfg.dropout_rate, name="mlp")(normed)
        if cfg.post_norms:
            hidden = cfg.norm("post_mlp_layer_norm")(hidden)
        return (constrain(x + dropout(hidden), *layers.STREAM), cache), None


class DecoderStack(nn.Module):
    """All layers, scanned over the leading axis of their parameters, the final norm, and an untied head."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.layers = layers.scan_layers(DecoderLayer, cfg, cfg.num_layers, (0, 0, *[nn.broadcast] * 3))
        self.decoder_norm = cfg.norm()
        if not cfg.tied_embeddings:
            self.logits_dense = layers.Dense(cfg.vocab_size)

    def __call__(self, x: Array, wide: View, local: View | None, cache: Any, cursor: Any) -> tuple[Array, Any]:
        """Maps `[batch, length, embed]`.

        Args:
            x: embedded tokens.
            wide: view of the global layers.
            local: view of the local layers; None if all are global.
            cache: of all layers (`models.stack`), or None.
            cursor: cache slot of the first token.

        Returns:
            Final states and the extended cache.
        """
        cfg = self.config
        is_global = (jnp.arange(cfg.num_layers) + 1) % cfg.global_every == 0
        layer = DecoderLayer(cfg, parent=None)
        (x, cache), _ = stack.run(self, layer, cfg.num_layers, (x, cache), (is_global,), (wide, local, cursor))
        return self.decoder_norm(x), cache


class DecoderModule(nn.Module):
    """Embedding, layers and head."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the submodules under T5X's names."""
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, _embedding_scale(cfg))
        self.embedding_dropout = layers.Dropout(cfg.dropout_rate)
        self.decoder = DecoderStack(cfg)

    def hidden(
        self,
        tokens: Array,
        prompt: Array | None,
        positions: Array,
        key_positions: Array,
        mask: Array,
        cache: Any = None,
        cursor: Any = 0,
        segments: Array | None = None,
    ) -> tuple[Array, Any]:
        """Returns final hidden states `[batch, length, embed]` and the extended cache.

        `mask` `[batch, length, keys]` is that of global layers. Local layers also bound the distance between
        `positions` `[batch, length]` and `key_positions` `[batch, keys]`, which are not the indices of a cache's slots
        or of a packed row. `segments` as in `View`, of rows that start in slot 0 of the cache if there is one.
        """
        cfg = self.config
        x = self.embedding_dropout(self.token_embedder(tokens, prompt, jnp.dtype(cfg.dtype)))
        bands = (cfg.rope_factor, cfg.rope_low_turns, cfg.rope_high_turns, cfg.rope_original_length)
        frequency = layers.rotary_frequencies(cfg.head_dim, cfg.rope_theta, *bands)
        wide = View(mask, *layers.rotation(positions, frequency), segments)
        local = None
        if cfg.window:
            distance = positions[:, :, None] - key_positions[:, None, :]
            angles = layers.rotation(positions, layers.rotary_frequencies(cfg.head_dim, cfg.local_rope_theta))
            local = View(mask & (distance < cfg.window), *angles, segments, jnp.bool_(True))
            wide = wide._replace(is_local=jnp.bool_(False))
        return self.decoder(x, wide, local, cache, cursor)

    def head(self, x: Array) -> Array:
        """Returns logits `[..., vocab]` in float32 of hidden states `[..., embed]`."""
        cfg = self.config
        logits = self.token_embedder.attend(x) if cfg.tied_embeddings else self.decoder.logits_dense(x)
        return layers.constrain_logits(layers.softcap(logits.astype(jnp.float32), cfg.logits_softcap))

    def __call__(self, tokens: Array) -> Array:
        """Returns the logits of token ids `[batch, length]`; `init` traces this."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = positions[:, :, None] >= positions[:, None, :]
        return self.head(self.hidden(tokens, None, positions, positions, mask)[0])


def _embedding_scale(config: DecoderConfig) -> float:
    return config.emb_dim**0.5 if config.embedding_scale else 1.0


@dataclasses.dataclass(frozen=True)
class DecoderModel(Family[DecoderConfig]):
    """A decoder-only model with the interface of all families, `base.Family`."""

    config: DecoderConfig
    partitioner: Partitioner | None = None

    continues = True
    module_class = DecoderModule

    @property
    def shares_prefixes(self) -> bool:
        """Whether `Tokens.prefix` may be set.

        Not with dropout, which each example has on its own prompt, and not where a kernel computes attention, which
        knows of segments alone.
        """
        kernel = attention.platform_kernel(self.config.attention, self.partitioner)
        return not self.config.dropout_rate and kernel == "xla"

    def init(self, key: Array) -> Params:
        """Returns random parameters, float32."""
        return self.module_class(self.config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def layout(self, rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
        """Returns a training batch of this family; see `Family.layout`."""
        return decoder_rows(rows, inputs + targets, targets)

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """Returns the states that predict the targets, `[batch, targets, embed]`; see `Family.hidden`."""
        segments, prefixes, positions = batch["segment_ids"], batch["prefix_ids"], batch["positions"]
        length = segments.shape[1]
        mask = (segments[:, :, None] == segments[:, None, :]) | (prefixes[:, :, None] == segments[:, None, :])
        mask &= jnp.tril(jnp.ones((length, length), bool))
        arguments = batch["tokens"], prompt, positions, positions, mask
        x, _ = self._apply(params, "hidden", *arguments, segments=segments, dropout_key=dropout_key)
        return jnp.take_along_axis(x, batch["target_positions"][..., None], axis=1)

    def target_segments(self, batch: Params) -> Array:
        """Returns the segment of each target; see `Family.target_segments`."""
        return jnp.take_along_axis(jnp.asarray(batch["segment_ids"]), batch["target_positions"], axis=1)

    def input_rows(self, params: Params, ids: Array) -> Array:
        """Returns the input embeddings of real token ids, `[..., embed]`, float32; see `Family.input_rows`."""
        scale = jnp.asarray(_embedding_scale(self.config), self.config.dtype).astype(jnp.float32)
        rows: Array = params["token_embedder"]["embedding"][ids].astype(jnp.float32) * scale
        return rows

    def prefill(
        self, params: Params, prompt: Array | None, inputs: Params, steps: int, prefix: Params | None = None
    ) -> tuple[Array, Params]:
        """Processes the inputs and allocates the cache; see `Family.prefill`.

        The state's `key_positions` `[batch, slots]` is the position of the token in each cache slot, `position`
        `[batch]` that of the next token.
        """
        last, state = self._process(params, prompt, inputs, steps, prefix)
        return self.head(params, last), state

    def _process(
        self, params: Params, prompt: Array | None, inputs: Params, steps: int, prefix: Params | None
    ) -> tuple[Array, Params]:
        """Returns the states of the inputs' last tokens, `[batch, embed]`, and the decoding state."""
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        batch, length = tokens.shape
        first, before, cache = self._after(prefix, batch, length + steps)
        slots = jnp.arange(length + steps)
        own = jnp.where(slots < lengths[:, None], first + slots, _EMPTY)
        key_positions = jnp.concatenate([before, own], axis=1)
        positions = jnp.broadcast_to(first + jnp.arange(length), tokens.shape)
        mask = key_positions[:, None, :] <= positions[:, :, None]
        past = before.shape[1]
        segments = (slots[:length] < lengths[:, None]).astype(jnp.int32) if prefix is None else None
        arguments = tokens, prompt, positions, key_positions, mask, cache, past
        x, cache = self._apply(params, "hidden", *arguments, segments=segments)
        state = {"cache": cache, "key_positions": key_positions, "position": first + lengths}
        return _last(x, lengths), {**state, "cursor": jnp.int32(past + length)}

    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row; see `Family.step`.

        In each step, all rows write to the same cache slot; the padding of a row before it stays masked.
        """
        cursor, positions, key_positions = state["cursor"], state["position"][:, None], state["key_positions"]
        slots = jnp.arange(key_positions.shape[1])
        key_positions = jnp.where(slots == cursor, positions, key_positions)
        mask = key_positions[:, None, :] <= positions[:, :, None]
        arguments = tokens[:, None], None, positions, key_positions, mask, state["cache"], cursor
        x, cache = self._apply(params, "hidden", *arguments)
        state = {"cache": cache, "key_positions": key_positions, "position": positions[:, 0] + 1}
        return self.head(params, x[:, 0]), {**state, "cursor": (cursor + 1) % len(slots)}

    def branches(
        self, params: Params, prompt: Array | None, inputs: Params, tokens: Array, prefix: Params | None = None
    ) -> tuple[Array, Array, Params]:
        """Returns the states that predict the tokens of several continuations of each input; see `Family.branches`."""
        batch, count, length = tokens.shape
        # The last token of a continuation predicts nothing.
        last, state = self._process(params, prompt, inputs, count * (length - 1), prefix)
        states = jnp.broadcast_to(last[:, None, None], (batch, count, 1, last.shape[-1]))
        if length > 1:
            after = self._continued(params, state, tokens[:, :, :-1])
            states = jnp.concatenate([states, after.reshape(batch, count, length - 1, -1)], axis=2)
        slots = state["key_positions"].shape[1] - count * (length - 1)
        cache = jax.tree.map(lambda leaf: leaf[:, :, :, :slots], state["cache"])
        state = {**state, "cache": cache, "key_positions": state["key_positions"][:, :slots]}
        return states, self.head(params, last), state

    def _continued(self, params: Params, state: Params, tokens: Array) -> Array:
        """Returns the states of continuations `[batch, count, length]`, each after its row's input."""
        batch, count, length = tokens.shape
        first = state["key_positions"].shape[1] - count * length  # the slot of the first continuation
        positions = state["position"][:, None] + jnp.tile(jnp.arange(length), count)
        key_positions = state["key_positions"].at[:, first:].set(positions)
        queries = jnp.repeat(jnp.arange(1, count + 1), length)
        keys = jnp.concatenate([jnp.zeros(first, jnp.int32), queries])
        mask = (key_positions[:, None, :] <= positions[:, :, None]) & ((keys == 0) | (keys == queries[:, None]))
        row = tokens.reshape(batch, -1)
        x: Array = self._apply(params, "hidden", row, None, positions, key_positions, mask, state["cache"], first)[0]
        return x

    def _after(self, prefix: Params | None, batch: int, slots: int) -> tuple[Any, Array, Params]:
        """Where sequences of `slots` tokens begin that follow a prefix, or nothing.

        Returns:
            The position of their first token, the positions of the prefix's slots `[batch, slots of the prefix]`, and a
            cache with the prefix in its first slots.
        """
        cfg = self.config
        shape = (cfg.num_layers, batch, cfg.num_kv_heads, slots, cfg.head_dim)
        empty = stack.zeros(shape, cfg.dtype, self.partitioner)
        if prefix is None:
            return 0, jnp.zeros((batch, 0), jnp.int32), empty

        def begun(leaf: Array, rest: Array) -> Array:
            return jnp.concatenate([jnp.broadcast_to(leaf, (*rest.shape[:3], *leaf.shape[3:])), rest], axis=3)

        before = jnp.broadcast_to(prefix["key_positions"], (batch, prefix["key_positions"].shape[1]))
        return prefix["position"][0], before, jax.tree.map(begun, prefix["cache"], empty)

    def empty(self, params: Params, rows: int, width: int, steps: int) -> Params:
        """Returns the state of rows that nothing has been put into; see `Family.empty`."""
        cfg = self.config
        shape = (rows, cfg.num_kv_heads, width + steps, cfg.head_dim)
        return {
            "cache": stack.empty_cache(params, cfg.num_layers, shape, cfg.dtype, self.partitioner),
            "key_positions": jnp.full((rows, width + steps), _EMPTY),
            "position": jnp.zeros(rows, jnp.int32),
            "cursor": jnp.int32(0),
        }

    def join(self, state: Params, new: Params, rows: Array) -> Params:
        """Puts rows of a new state into a running one; see `Family.join`."""
        cursor, key_positions = state["cursor"], state["key_positions"]
        added = stack.in_ring(new["key_positions"], key_positions.shape[1], cursor, axis=1, fill=_EMPTY)
        return {
            "cache": stack.join_cache(state["cache"], new["cache"], rows, cursor),
            "key_positions": key_positions.at[rows].set(added, mode="drop"),
            "position": state["position"].at[rows].set(new["position"], mode="drop"),
            "cursor": cursor,
        }

    def move(self, state: Params, rows: Array, width: int, steps: int) -> Params:
        """Returns the state of some rows of a running one; see `Family.move`."""
        cursor, slots = state["cursor"], width + steps
        key_positions = jnp.roll(state["key_positions"][rows], -cursor, axis=1)
        return {
            "cache": stack.move_cache(state["cache"], rows, slots, cursor),
            "key_positions": stack.in_ring(key_positions, slots, 0, axis=1, fill=_EMPTY),
            "position": state["position"][rows],
            "cursor": jnp.int32(0),
        }

    def reorder(self, state: Params, choice: Array) -> Params:
        """Returns the decoding state with its rows reordered within their groups; see `Family.reorder`."""
        cache = {name: stack.take_rows(leaf, choice, axis=1) for name, leaf in state["cache"].items()}
        rows = {name: stack.take_rows(state[name], choice, axis=0) for name in ("key_positions", "position")}
        return {**state, "cache": cache, **rows}


def _last(x: Array, lengths: Array) -> Array:
    """Returns the state of each row's last token, `[batch, embed]`, of `[batch, length, embed]`."""
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
