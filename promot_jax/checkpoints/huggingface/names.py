"""Our leaf paths and Hugging Face's tensor names: one table per family, read in both directions.

Layers are stacked in our tree and apart outside; "{}" in a name is the layer. Kernels, and the relative position
table, are transposed outside: `[out, in]`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from promot_jax.checkpoints import placement

Config = Mapping[str, Any]


class Name(NamedTuple):
    """One leaf of ours and its tensor."""

    leaf: str  # path in `params["model"]`
    tensors: tuple[str, ...]  # outside; the first is written, the others are copies that may be there as well
    shape: tuple[int, ...]  # of ours, one layer

    @property
    def stacked(self) -> bool:
        """Whether it is in every layer."""
        return "{}" in self.tensors[0]

    @property
    def transposed(self) -> bool:
        """Whether the tensor is the transpose of our leaf."""
        return self.leaf.endswith(("kernel", "rel_embedding"))

    def of(self, layer: int) -> str:
        """The tensor's name in a layer."""
        return self.tensors[0].replace("{}", str(layer))


_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def table(family: str, config: Config) -> list[Name]:
    """Returns every leaf of a model ("decoder" or "t5") with its names outside; `config` has all fields."""
    return list({"decoder": _decoder, "t5": _t5}[family](config))


def layers(family: str, config: Config, leaf: str) -> int:
    """Layers of the stack that a leaf belongs to."""
    if family == "t5":
        return int(config["num_encoder_layers" if leaf.startswith("encoder") else "num_decoder_layers"])
    return int(config["num_layers"])


def sources(table: Iterable[Name], family: str, config: Config, stored: Collection[str]) -> dict[str, list[str]]:
    """Names of the tensors that each leaf is made of, one per layer; of several copies, the first that is stored."""
    return {
        name.leaf: [name.of(i) for i in range(layers(family, config, name.leaf))]
        if name.stacked
        else [next((copy for copy in name.tensors if copy in stored), name.tensors[0])]
        for name in table
    }


def check(
    origin: str,
    table: Iterable[Name],
    sources: Mapping[str, list[str]],
    stored: Mapping[str, placement.Stored],
    spare: Callable[[str], object],
) -> None:
    """Raises UserError unless the tensors of a model, and no others that are not `spare`, are stored as it needs."""
    expected = {
        source: name.shape[::-1] if name.transposed else name.shape for name in table for source in sources[name.leaf]
    }
    placement.check(origin, expected, stored, spare)


def entries(
    table: Iterable[Name], sources: Mapping[str, list[str]], reader: Callable[[str, str], placement.Reader]
) -> dict[str, placement.Entry]:
    """Returns how each leaf is read: `reader(leaf, tensor)` makes the function that reads rows of a tensor."""
    made = {}
    for name in table:
        parts = tuple(reader(name.leaf, source) for source in sources[name.leaf])
        shape = (len(parts), *name.shape) if name.stacked else name.shape
        made[name.leaf] = placement.Entry(shape, parts, name.stacked, name.transposed)
    return made


def _decoder(config: Config) -> Iterator[Name]:
    """Llama, Qwen 2 and 3 (norms before each half of a layer), Gemma 2 and 3 (before and after)."""
    emb, mlp, head = config["emb_dim"], config["mlp_dim"], config["head_dim"]
    query, key = config["num_heads"] * head, config["num_kv_heads"] * head
    tied = ("lm_head.weight",) if config["tied_embeddings"] else ()
    yield Name("token_embedder/embedding", ("model.embed_tokens.weight", *tied), (config["vocab_size"], emb))
    yield Name("decoder/decoder_norm/scale", ("model.norm.weight",), (emb,))
    if not tied:
        yield Name("decoder/logits_dense/kernel", ("lm_head.weight",), (emb, config["vocab_size"]))

    def layer(leaf: str, name: str, *shape: int) -> Name:
        return Name(f"decoder/layers/{leaf}", (f"model.layers.{{}}.{name}.weight",), shape)

    norms = {"pre_self_attention_layer_norm": "input_layernorm", "pre_mlp_layer_norm": "post_attention_layernorm"}
    if config["post_norms"]:
        norms["post_self_attention_layer_norm"] = "post_attention_layernorm"
        norms["pre_mlp_layer_norm"] = "pre_feedforward_layernorm"
        norms["post_mlp_layer_norm"] = "post_feedforward_layernorm"
    for ours, theirs in norms.items():
        yield layer(f"{ours}/scale", theirs, emb)
    for ours, short in _PROJECTIONS.items():
        width = {"query": query, "key": key, "value": key, "out": query}[ours]
        shape = (width, emb) if ours == "out" else (emb, width)
        yield layer(f"self_attention/{ours}/kernel", f"self_attn.{short}_proj", *shape)
        if config["qkv_bias"] and ours != "out":
            name = f"model.layers.{{}}.self_attn.{short}_proj.bias"
            yield Name(f"decoder/layers/self_attention/{ours}/bias", (name,), (width,))
    if config["qk_norm"]:
        yield layer("self_attention/query_norm/scale", "self_attn.q_norm", head)
        yield layer("self_attention/key_norm/scale", "self_attn.k_norm", head)
    yield layer("mlp/wi_0/kernel", "mlp.gate_proj", emb, mlp)
    yield layer("mlp/wi_1/kernel", "mlp.up_proj", emb, mlp)
    yield layer("mlp/wo/kernel", "mlp.down_proj", mlp, emb)


def _t5(config: Config) -> Iterator[Name]:
    """T5 1.0 (`wi`, tied), T5 1.1, mT5, Flan-T5, ByT5 (`wi_0`, `wi_1`)."""
    emb, mlp, heads = config["emb_dim"], config["mlp_dim"], config["num_heads"]
    joined, vocab = heads * config["head_dim"], config["vocab_size"]
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tied = ("lm_head.weight",) if config["tied_embeddings"] else ()
    yield Name("token_embedder/embedding", ("shared.weight", *copies, *tied), (vocab, emb))
    if not tied:
        yield Name("decoder/logits_dense/kernel", ("lm_head.weight",), (emb, vocab))
    gated = len(config["mlp_activations"]) == 2
    for stack in ("encoder", "decoder"):
        self_attention = "attention" if stack == "encoder" else "self_attention"
        parts = [(self_attention, "SelfAttention", f"pre_{self_attention}_layer_norm")]
        if stack == "decoder":
            parts.append(("encoder_decoder_attention", "EncDecAttention", "pre_cross_attention_layer_norm"))

        def layer(leaf: str, name: str, *shape: int, stack: str = stack) -> Name:
            return Name(f"{stack}/layers/{leaf}", (f"{stack}.block.{{}}.layer.{name}.weight",), shape)

        for place, (ours, theirs, norm) in enumerate(parts):
            yield layer(f"{norm}/scale", f"{place}.layer_norm", emb)
            for projection, short in _PROJECTIONS.items():
                shape = (joined, emb) if projection == "out" else (emb, joined)
                yield layer(f"{ours}/{projection}/kernel", f"{place}.{theirs}.{short}", *shape)
        last = len(parts)
        yield layer("pre_mlp_layer_norm/scale", f"{last}.layer_norm", emb)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            yield layer(f"mlp/{name}/kernel", f"{last}.DenseReluDense.{name}", emb, mlp)
        yield layer("mlp/wo/kernel", f"{last}.DenseReluDense.wo", mlp, emb)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Name(f"{stack}/relpos_bias/rel_embedding", (bias,), (heads, config["relative_buckets"]))
        yield Name(f"{stack}/{stack}_norm/scale", (f"{stack}.final_layer_norm.weight",), (emb,))
