"""Model families behind one interface; training, evaluation and decoding do not ask which family they hold."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models.batch_layout import Batch, Tokens
from promot_jax.models.decoder import DecoderConfig, DecoderModel
from promot_jax.models.t5 import T5Config, T5Model

__all__ = ["CONFIGS", "Config", "DecoderConfig", "DecoderModel", "Model", "T5Config", "T5Model", "build"]

Array = jax.Array
Params = dict[str, Any]
Config = DecoderConfig | T5Config
CONFIGS: dict[str, type[Config]] = {"decoder": DecoderConfig, "t5": T5Config}  # by family, as readers of formats say it


class Model(Protocol):
    """What every family offers, as pure functions of its parameters.

    Parameters are the plain dict of `params["model"]`; `prompt` is the table of all soft prompts (`prompts.table`),
    `[prompt rows, embed]`, or None. Nothing here knows which rows hold a prompt: ids from `config.vocab_size` on do.
    """

    @property
    def config(self) -> Config:
        """Sizes."""

    @property
    def partitioner(self) -> Partitioner | None:
        """Places activations; None leaves them to the compiler."""

    @property
    def continues(self) -> bool:
        """Whether targets continue the inputs in one sequence; otherwise inputs are encoded, and end with EOS."""

    def init(self, key: Array) -> Params:
        """Random parameters, float32."""

    def layout(self, rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
        """Lays sequences out as a training batch of NumPy arrays.

        Args:
            rows: each row's sequences, several when packed.
            inputs: room for input tokens per row, prompts included.
            targets: room for target tokens per row.

        Returns:
            What `hidden` reads, and `targets` `[batch, targets]` int32 with `weights` `[batch, targets]` float32.
        """

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """States that predict the targets of a batch of `layout`, `[batch, targets, embed]`; a key turns dropout on."""

    def head(self, params: Params, hidden: Array) -> Array:
        """Logits `[..., vocab]`, float32, of states `[..., embed]`."""

    def input_rows(self, params: Params, ids: Array) -> Array:
        """What the first layer reads for real token ids: `[..., embed]`, float32; what soft prompts start from."""

    def prefill(self, params: Params, prompt: Array | None, inputs: Params, steps: int) -> tuple[Array, Params]:
        """Reads the inputs and makes room for `steps` more tokens.

        Args:
            params: model parameters.
            prompt: `[prompt rows, embed]` or None.
            inputs: `tokens` `[batch, length]`, padded on the right, and `lengths` `[batch]` (0: a row of padding).
            steps: tokens that may follow.

        Returns:
            Logits `[batch, vocab]` of the first new token, and the decoding state.
        """

    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row: `tokens` `[batch]` to logits `[batch, vocab]` and the new state."""

    def reorder(self, state: Params, choice: Array) -> Params:
        """The decoding state with rows repeated, dropped or exchanged, each among its neighbours (beam search).

        Args:
            state: of `groups * old` rows, those of one group side by side.
            choice: int32 `[groups, new]`: which of its group's `old` rows each new one is. Groups stay where they are,
                so that devices which share a batch exchange nothing.
        """


def build(config: Config, partitioner: Partitioner | None = None) -> Model:
    """Returns the model of a config; a partitioner says where its activations lie, None leaves that to the compiler."""
    return T5Model(config, partitioner) if isinstance(config, T5Config) else DecoderModel(config, partitioner)
