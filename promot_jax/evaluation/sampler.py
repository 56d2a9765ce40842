"""Text in, text out: a model generates for requests, in batches; inference and evaluation share it."""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data.encoding import Encoder
from promot_jax.data.vocabularies.controls import unmarked
from promot_jax.decoding.continuous_batching import generate_all
from promot_jax.decoding.inputs import Engine, Input
from promot_jax.decoding.output_text import SENTINELS, first_span, spelled, stop_mask
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.params import soft_prompts
from promot_jax.params.dtypes import cast_weights
from promot_jax.progress.items import shown

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """An input that a model generates an output for."""

    text: str  # the whole input
    prompt: str = ""  # name of the soft prompt to prepend; "" for none
    limit: int = 0  # longest output in tokens, at most `Decoding.max_tokens`; 0 for that
    group: str = ""  # requests of one group start alike, which saves time: what they share is processed once
    sentinel: bool = True  # whether the input ends with a sentinel where `Evaluation.sentinel` asks for them
    labels: tuple[str, ...] = ()  # scored by likelihood, beside the output


class Reply(NamedTuple):
    """A model's output for a request."""

    request: int  # its index
    text: str  # the raw output
    likelihoods: dict[str, float]  # log-likelihood by label


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
            settings: `decoding`, `sentinel`, `tokens_per_batch`, `cache_tokens` and, to sample, `exemplar_seed` count.
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
        """Returns the model's raw output for every request, in order, and shows progress meanwhile; see `stream`.

        Texts are a person's: marks of control tokens in them count for nothing (`vocabularies.controls`).
        """
        safe = [dataclasses.replace(request, text=unmarked(request.text)) for request in requests]
        replies = sorted(shown(self.stream(params, safe), len(safe), "Outputs"))
        return [reply.text for reply in replies]

    def stream(self, params: Params, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yields the model's reply to each request, as they are finished.

        All hosts call this with the same requests; each answers the rows of its devices, and all get all outputs.
        Sampled outputs are a function of `Evaluation.exemplar_seed`, the request, and how often it came before: not of
        the other requests, and not of the place in a batch.

        A label has the ids that it has as a target, one space after the request's text, without the end of the
        sequence. Where the request has a sentinel, the label follows it and the sentinel itself is not scored.

        Args:
            params: `{"model": ..., "prompt": {name: rows}}`; without "prompt", or with requests that name none, the
                plain model answers.
            requests: inputs; one batch may mix soft prompts and none.

        Raises:
            UserError: a request names a soft prompt that is not in `params`, or is too long.
            PreemptedError: between two batches.
        """
        settings, prompt = self.settings.decoding, _prompts_in_use(params, requests)
        limits = [min(request.limit or settings.max_tokens, settings.max_tokens) for request in requests]
        inputs = list(map(self._input, self._encode(prompt, requests), limits, requests, _seeds(requests)))
        self._check_lengths(inputs)
        for index, ids, scores in generate_all(self._engine(params, prompt), inputs):
            labels = requests[index].labels
            likelihoods = {} if scores is None else dict(zip(labels, map(float, scores), strict=True))
            yield Reply(index, self._text(ids), likelihoods)

    def _input(self, ids: list[int], limit: int, request: Request, seed: int) -> Input:
        encoder = self._encoder(request)
        labels = encoder.continuations(request.text, request.labels) if request.labels else []
        return Input(ids, limit, seed, request.group, tuple(map(tuple, labels)), int(encoder.sentinel_id is not None))

    def _engine(self, params: Params, prompt: Params) -> Engine:
        model, settings = self.base.model, self.settings
        return Engine(
            model,
            settings.decoding,
            cast_weights(params["model"], model.config.dtype),  # once here, not at every decoding step
            soft_prompts.table(prompt),
            self._stops,
            jax.random.key(settings.exemplar_seed),
            self._partitioner,
            settings.tokens_per_batch,
            settings.cache_tokens,
        )

    def answer(self, raw: str) -> str:
        """The answer in a raw output: all of it, or its first span where `Evaluation.sentinel` asks for sentinels."""
        return first_span(raw) if self.settings.sentinel else raw

    def _encode(self, prompt: Params, requests: Sequence[Request]) -> list[list[int]]:
        prompt_ids = soft_prompts.layout(prompt, self.base.model.config.vocab_size)
        return [
            self._encoder(request).with_prompts(prompt_ids).inputs(request.text, request.prompt) for request in requests
        ]

    def _encoder(self, request: Request) -> Encoder:
        """The encoder of a request, without soft prompts."""
        sentinel_id = self._sentinels.get(SENTINELS[0]) if request.sentinel else None
        return dataclasses.replace(self.encoder, sentinel_id=sentinel_id)

    def _check_lengths(self, inputs: Sequence[Input]) -> None:
        """Raises UserError for an input that leaves its output no room in the model's context."""
        model = self.base.model
        context = model.config.max_length
        for each in inputs:
            room = max([each.limit, *map(len, each.continuations)])
            after = room if model.continues else 0
            if context and len(each.ids) + after > context:
                raise UserError(
                    f"An input of {len(each.ids)} tokens, its prompt included, and an output of up to {room} do not "
                    f"fit the model's context of {context}; lower Evaluation.max_input_length or Decoding.max_tokens."
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


def _seeds(requests: Sequence[Request]) -> list[int]:
    """A seed of each request, 32 bits: of its text, its soft prompt, and how many equal requests came before."""
    before: collections.Counter[str] = collections.Counter()
    seeds = []
    for request in requests:
        name = f"{request.prompt}\0{request.text}"
        seeds.append(zlib.crc32(f"{before[name]}\0{name}".encode()))
        before[name] += 1
    return seeds
