"""Sizes and variants of the decoder-only models."""

import dataclasses

from promot_jax.errors import UserError
from promot_jax.models import attention, layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a decoder-only model; the defaults are Llama's."""

    vocab_size: int  # real tokens; ids from here on are soft-prompt rows
    emb_dim: int  # width of the residual stream
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; divides `num_heads`
    num_layers: int  # decoder layers, stacked on the leading axis of every layer parameter
    head_dim: int  # size of one head, even
    mlp_dim: int  # hidden size of the gated MLP
    rope_theta: float = 1e4  # base of the rotary frequencies, in global layers
    norm_eps: float = 1e-5  # epsilon of every RMSNorm
    tied_embeddings: bool = True  # whether the output head is the embedding table
    max_length: int = 8192  # longest sequence the model was trained for, in tokens; 0 is no limit
    dropout_rate: float = 0.0  # in training, on embeddings, attention output, MLP hidden and output
    dtype: str = "float32"  # of activations and products, "float32" or "bfloat16"; parameters stay float32
    # What a layer recomputes in its backward pass: "none" nothing, "dots" all but the outputs of linear layers,
    # "attention" and "mlp" all but those of that part, "full" everything. True and False are "full" and "none".
    remat: str | bool = "dots"
    # "xla", "cudnn" (GPUs), "splash" (TPUs; on a CPU it is interpreted, for tests), or "auto": by platform and shapes
    # (`attention.choose`). Decoding steps run by XLA.
    attention: str = "auto"
    activation: str = "silu"  # of the MLP's gate, "silu" or "gelu" (tanh approximation)
    qkv_bias: bool = False  # whether queries, keys and values have biases (Qwen 2)
    qk_norm: bool = False  # whether queries and keys are normalised per head, before rotation (Gemma 3, Qwen 3)
    norm_offset: float = 0.0  # added to the scale of every norm; 1.0 if scales are stored around zero (Gemma)
    # Whether the outputs of attention and MLP are normalised before they are added (Gemma 2 and 3).
    post_norms: bool = False
    # Whether token embeddings, but not soft prompts, are multiplied by `sqrt(emb_dim)` (Gemma).
    embedding_scale: bool = False
    query_scale: float | None = None  # of attention logits; None is `head_dim ** -0.5`
    attention_softcap: float = 0.0  # bound of attention logits, 0.0 for none (Gemma 2)
    logits_softcap: float = 0.0  # bound of output logits, 0.0 for none (Gemma 2)
    window: int = 0  # tokens that a local layer attends to, the query's own included; 0 makes all layers global
    global_every: int = 1  # layer i is global if `(i + 1) % global_every == 0`, else local
    local_rope_theta: float = 1e4  # `rope_theta` of local layers
    rope_factor: float = 1.0  # divisor of the rotary frequencies in global layers
    rope_low_turns: float = 0.0  # `low_turns` of `layers.rotary_frequencies` (Llama 3.1)
    rope_high_turns: float = 0.0  # `high_turns` there
    rope_original_length: int = 0  # `length` there; 0 divides all frequencies

    def __post_init__(self) -> None:
        """Raises UserError for sizes that cannot be built."""
        layers.check_config(self)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads do not divide into {self.num_kv_heads} key/value heads.")
        if self.head_dim % 2:
            raise UserError(f"Rotary positions need an even head size, not {self.head_dim}.")
        if self.attention not in attention.ATTENTION:
            names = ", ".join(map(repr, attention.ATTENTION))
            raise UserError(f"attention is {self.attention!r}; use one of {names}.")
        if self.activation not in layers.ACTIVATIONS:
            raise UserError(f"activation is {self.activation!r}; use one of {', '.join(layers.ACTIVATIONS)}.")
        if self.window < 0 or self.global_every < 1 or self.rope_factor <= 0:
            raise UserError(
                "A window is not negative, global_every at least 1 and rope_factor positive, not "
                f"{self.window}, {self.global_every}, {self.rope_factor}."
            )
        if self.rope_original_length and not 0 < self.rope_low_turns < self.rope_high_turns:
            raise UserError(
                "Scaling by rope_original_length needs 0 < rope_low_turns < rope_high_turns, not "
                f"{self.rope_low_turns} and {self.rope_high_turns}."
            )

    def norm(self, name: str | None = None) -> layers.RMSNorm:
        """Returns a norm of this model."""
        return layers.RMSNorm(self.norm_eps, self.norm_offset, name=name)
