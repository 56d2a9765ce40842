"""Text in, text out: a model generates for requests, in batches; inference and evaluation share it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data import batches
from promot_jax.data.encoding import Encoder
from promot_jax.decoding.generate import generate
from promot_jax.decoding.output_text import SENTINELS, first_span, spelled, stop_mask
from promot_jax.distributed import hosts, preemption
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.params import soft_prompts
from promot_jax.params.dtypes import cast_weights

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """An input that a model generates an output for."""

    text: str  # the whole input
    prompt: str = ""  # name of the soft prompt to prepend; "" for none
    limit: int = 0  # longest output in tokens, at most `Decoding.max_tokens`; 0 for that
    sentinel: bool = True  # whether the input ends with a sentinel where `Evaluation.sentinel` asks for them


class Sampler:
    """Generates with one model architecture and tokenizer; parameters are given at each call.

    Attributes:
        base: model and tokenizer.
        settings: how it decodes, and the sizes of its batches.
        encoder: of inputs without a soft prompt or a sentinel.
    """

    def __init__(self, base: Pretrained, settings: Evaluation, partitioner: Partitioner):
        """Prepares decoding.

        Args:
            base: model and tokenizer.
            settings: `decoding`, `sentinel`, `tokens_per_batch` and, for sampling, `exemplar_seed` count.
            partitioner: places batches.

        Raises:
            UserError: sentinels are asked for, but the tokenizer has none.
        """
        self.base, self.settings, self._partitioner = base, settings, partitioner
        vocabulary = base.vocabulary
        self.encoder = Encoder.of(vocabulary, continues=base.model.continues)
        self._sentinels = vocabulary.sentinels if settings.sentinel else {}
        if settings.sentinel and SENTINELS[0] not in self._sentinels:
            raise UserError(f"The tokenizer of this model has no {SENTINELS[0]}; set Evaluation.sentinel = False.")
        strings = vocabulary.token_strings()
        # Padding rows of the head, if any, stop too: they are no token.
        padding = range(len(strings), base.model.config.vocab_size)
        self._stops = stop_mask([*strings, *("" for _ in padding)], settings.decoding.stop, *base.end_ids, *padding)

    def ask(self, params: Params, requests: Sequence[Request]) -> list[str]:
        """Returns the model's raw output for every request, in order.

        All hosts call this with the same requests; each answers the rows of its devices, and all get all outputs.

        Args:
            params: `{"model": ..., "prompt": {name: rows}}`; without "prompt", or with requests that name none, the
                plain model answers.
            requests: inputs; one batch may mix soft prompts and none.

        Raises:
            UserError: a request names a soft prompt that is not in `params`, or is too long.
            PreemptedError: between two batches.
        """
        model, settings = self.base.model, self.settings.decoding
        prompt = _prompts_in_use(params, requests)
        table = soft_prompts.table(prompt)
        # Cast once here, not at every decoding step.
        weights = cast_weights(params["model"], model.config.dtype)
        inputs = self._encode(prompt, requests)
        limits = np.array([min(request.limit or settings.max_tokens, settings.max_tokens) for request in requests])
        self._check_lengths(inputs, limits)
        outputs = [""] * len(requests)
        budget = self.settings.tokens_per_batch // settings.beams  # a beam takes the memory of a row
        groups = batches.buckets(inputs, budget, self._partitioner.rows(), limits)
        for count, (members, batch) in enumerate(groups):
            key = jax.random.fold_in(jax.random.key(self.settings.exemplar_seed), count)
            rows_limits = np.ones(len(batch["lengths"]), np.int32)
            rows_limits[: len(members)] = limits[members]
            placed = self._partitioner.batch(batch)
            ids = generate(model, settings, weights, table, placed, self._stops, rows_limits, key)
            for member, row in zip(members, hosts.whole(ids), strict=False):
                outputs[member] = self._text(row)
            preemption.check("during an evaluation")
        return outputs

    def answer(self, raw: str) -> str:
        """The answer in a raw output: all of it, or its first span where `Evaluation.sentinel` asks for sentinels."""
        return first_span(raw) if self.settings.sentinel else raw

    def _encode(self, prompt: Params, requests: Sequence[Request]) -> list[list[int]]:
        encoder = self.encoder.with_prompts(soft_prompts.layout(prompt, self.base.model.config.vocab_size))
        with_sentinel = dataclasses.replace(encoder, sentinel_id=self._sentinels.get(SENTINELS[0]))
        return [
            (with_sentinel if request.sentinel else encoder).inputs(request.text, request.prompt)
            for request in requests
        ]

    def _check_lengths(self, inputs: Sequence[Sequence[int]], limits: Sequence[int] | np.ndarray) -> None:
        """Raises UserError for an input that leaves its output no room in the model's context."""
        model = self.base.model
        context = model.config.max_length
        for ids, limit in zip(inputs, limits, strict=True):
            after = int(limit) if model.continues else 0
            if context and len(ids) + after > context:
                raise UserError(
                    f"An input of {len(ids)} tokens, its prompt included, and an output of up to {limit} do not fit "
                    f"the model's context of {context}; lower Evaluation.max_input_length or Decoding.max_tokens."
                )

    def _text(self, ids: np.ndarray) -> str:
        ends = {-1, *self.base.end_ids}
        answer = itertools.takewhile(lambda i: i not in ends, map(int, ids))
        output = spelled(list(answer), self._sentinels, self.base.vocabulary.decode)
        stop = self.settings.decoding.stop
        return output.split(stop, 1)[0] if stop else output


def _prompts_in_use(params: Params, requests: Sequence[Request]) -> Params:
    """The soft prompts that requests name: where none does, the model runs without a table, bitwise the plain model."""
    prompt = params.get("prompt", {})
    used = {request.prompt for request in requests} - {""}
    if unknown := used - set(prompt):
        raise UserError(f"There is no soft prompt called {min(unknown)!r} here.")
    return {name: prompt[name] for name in used}
