"""The interface of all model families, and the code that they share."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax

from promot_jax.distributed.partitioning import Partitioner, activations
from promot_jax.models.batch_layout import Batch, Tokens

Array = jax.Array
Params = dict[str, Any]
Config_co = TypeVar("Config_co", covariant=True)


class Family(abc.ABC, Generic[Config_co]):
    """A model family: a Linen module as pure functions of its parameters, on the mesh of a partitioner.

    Parameters are the plain dict `params["model"]`. `prompt` is the table of all soft prompts (`soft_prompts.table`),
    `[prompt rows, embed]`, or None. An example uses a prompt row if its tokens contain the row's virtual id,
    `config.vocab_size` or above; no method needs to know which prompt is attached.
    """

    config: Config_co  # sizes and variants
    partitioner: Partitioner | None  # shards activations; None leaves them to the compiler
    # Whether targets continue the inputs in one sequence; otherwise inputs are encoded and end with EOS.
    continues: ClassVar[bool]
    module_class: ClassVar[Any]  # makes the Linen module of a config

    @property
    @abc.abstractmethod
    def shares_prefixes(self) -> bool:
        """Whether sequences of a row may share their first inputs (`Tokens.prefix`) without a change of any state."""

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Returns random parameters, float32."""

    @abc.abstractmethod
    def layout(self, rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> Batch:
        """Returns a training batch of NumPy arrays.

        Args:
            rows: the sequences of each row, several if packed.
            inputs: input tokens per row, prompts included.
            targets: target tokens per row.

        Returns:
            The arrays for `hidden`, and `targets` `[batch, targets]` int32 with `weights` `[batch, targets]` float32.
        """

    @abc.abstractmethod
    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """Returns the states that predict a batch's targets, `[batch, targets, embed]`; a key turns dropout on."""

    @abc.abstractmethod
    def target_segments(self, batch: Params) -> Array:
        """Returns the segment of each target of a batch, int32 `[batch, targets]`; equal ones belong to one example."""

    def head(self, params: Params, hidden: Array) -> Array:
        """Returns logits `[..., vocab]`, float32, of states `[..., embed]`."""
        logits: Array = self._apply(params, "head", hidden)
        return logits

    @abc.abstractmethod
    def input_rows(self, params: Params, ids: Array) -> Array:
        """Returns the input embeddings of real token ids, `[..., embed]`, float32; soft prompts start from them."""

    @abc.abstractmethod
    def prefill(
        self, params: Params, prompt: Array | None, inputs: Params, steps: int, prefix: Params | None = None
    ) -> tuple[Array, Params]:
        """Processes the inputs and allocates the cache for `steps` more tokens.

        Args:
            params: model parameters.
            prompt: `[prompt rows, embed]` or None.
            inputs: `tokens` `[batch, length]`, padded on the right, and `lengths` `[batch]` (0: a row of padding).
            steps: upper bound of the calls of `step`.
            prefix: state of a prefill of one row, which all inputs continue; None for nothing. Only of families that
                `continues`.

        Returns:
            Logits `[batch, vocab]` of the first new token, and the decoding state.
        """

    @abc.abstractmethod
    def step(self, params: Params, state: Params, tokens: Array) -> tuple[Array, Params]:
        """Appends one real token per row: `tokens` `[batch]` to logits `[batch, vocab]` and the new state."""

    @abc.abstractmethod
    def branches(
        self, params: Params, prompt: Array | None, inputs: Params, tokens: Array, prefix: Params | None = None
    ) -> tuple[Array, Array, Params]:
        """Returns the states that predict the tokens of several continuations of each input, and its own prefill.

        The inputs are processed once for all their continuations, and for what is generated after them.

        Args:
            params: model parameters.
            prompt: as in `prefill`, like `inputs` and `prefix`.
            inputs: `tokens` `[batch, width]` and `lengths` `[batch]`.
            tokens: of the continuations, `[batch, count, length]`, padded on the right.
            prefix: what all inputs continue, or None.

        Returns:
            States `[batch, count, length, embed]`, and the logits and the decoding state of `prefill` with no steps.
        """

    @abc.abstractmethod
    def empty(self, params: Params, rows: int, width: int, steps: int) -> Params:
        """Returns the decoding state of `rows` rows that `join` fills: of up to `width` input tokens and `steps` steps.

        Its cache slots are a ring, so that the state may run on for any number of steps.
        """

    @abc.abstractmethod
    def join(self, state: Params, new: Params, rows: Array) -> Params:
        """Puts the rows of a new state in the places of finished rows of a running one (continuous batching).

        Args:
            state: of `empty`, after any number of steps.
            new: of `prefill` with `steps` = 0.
            rows: int32 `[new rows]`, the place of each; places that are not there leave a row out.
        """

    @abc.abstractmethod
    def move(self, state: Params, rows: Array, width: int, steps: int) -> Params:
        """Returns the state of some rows of a running one, with room for as much as `empty` is told.

        Args:
            state: of `empty`, for no wider inputs and no more steps, after any number of steps.
            rows: int32 `[new rows]`; the state of a row below 0 is never looked at.
            width: tokens of the longest input.
            steps: tokens of the longest output.
        """

    @abc.abstractmethod
    def reorder(self, state: Params, choice: Array) -> Params:
        """Returns the decoding state with rows repeated, dropped or exchanged within their group (beam search).

        Args:
            state: of `groups * old` rows; the rows of a group are adjacent.
            choice: int32 `[groups, new]`: for each new row, the index of an old row in the same group. Groups stay in
                place, so devices that share a batch exchange nothing.
        """

    def _apply(self, params: Params, method: str, *args: Any, dropout_key: Array | None = None, **options: Any) -> Any:
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        with activations(self.partitioner):
            return self.module_class(self.config).apply({"params": params}, *args, method=method, rngs=rngs, **options)
