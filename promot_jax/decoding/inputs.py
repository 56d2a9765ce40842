"""What a model generates for, and the batches in which it is processed: inputs of similar length wait together.

Inputs of a group that start alike (k-shot prompts of a task with the same exemplars) share one prefill of that prefix,
which is cut where all their ids agree: the ids of every input stay the same.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from promot_jax.data import batches
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.forward_programs import jit_forward
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import Model
from promot_jax.models.batch_layout import Batch

Array = jax.Array

LEAST_PREFIX = 32  # shorter shared beginnings are processed with each row: a prefix takes programs of its own


@dataclasses.dataclass(frozen=True)
class Input:
    """Token ids that an output is generated for."""

    ids: list[int]  # virtual ids of a soft prompt included
    limit: int  # longest output in tokens, at most `Decoding.max_tokens`
    seed: int = 0  # of sampling, 32 bits: outputs depend on it, not on the place in a batch
    group: str = ""  # inputs of one group start alike: what they share is processed once; "" shares nothing
    continuations: tuple[tuple[int, ...], ...] = ()  # token ids whose likelihood after the input is asked for
    unscored: int = 0  # of each continuation, so many of its first tokens are given, not scored


@dataclasses.dataclass(frozen=True)
class Engine:
    """What generates.

    Attributes:
        model: of any family.
        settings: how outputs are chosen.
        params: of the model, in the dtype that it computes in.
        table: prompt table `[prompt rows, embed]`, or None.
        stops: bool `[vocab]`, True for tokens that end an output.
        key: random key for sampling.
        partitioner: places batches.
        prefill_tokens: of inputs that are processed together.
        cache_tokens: of inputs and outputs whose keys and values are held together.
    """

    model: Model
    settings: Decoding
    params: Any
    table: Array | None
    stops: np.ndarray
    key: Array
    partitioner: Partitioner
    prefill_tokens: int
    cache_tokens: int


@dataclasses.dataclass(frozen=True)
class Waiting:
    """Inputs that are processed together."""

    members: np.ndarray  # indices of the inputs
    # As `batches.buckets` pads them, without the prefix. With `continuations` `[rows, count, length]`, padded with -1,
    # and `unscored` `[rows]` where the inputs have continuations.
    batch: Batch
    prefix: tuple[int, ...]  # ids that all of them start with, which are processed once

    @property
    def width(self) -> int:
        """Slots of a row in a cache."""
        return int(self.batch["tokens"].shape[1]) + (batches.width(len(self.prefix)) if self.prefix else 0)


def waiting_batches(inputs: Sequence[Input], budget: int, engine: Engine) -> list[Waiting]:
    """Returns the inputs in batches, of each prefix and width those with the longest outputs first.

    Inputs with continuations of similar number and length share batches, so that few programs are compiled.

    Args:
        inputs: to be processed.
        budget: tokens of a batch, continuations included.
        engine: its model and partitioner count.

    Raises:
        UserError: an input is empty or too long.
    """
    batches.check_lengths(np.array([len(each.ids) for each in inputs], np.int32))
    groups: dict[tuple[str, int, int], list[int]] = {}
    for index, each in enumerate(inputs):
        longest = max([1, *map(len, each.continuations)]) if each.continuations else 0
        count, length = _power(len(each.continuations)), _power(longest)
        groups.setdefault((each.group if engine.model.continues else "", count, length), []).append(index)
    waiting = []
    for (group, count, length), indices in groups.items():
        prefix = shared_prefix([inputs[index].ids for index in indices]) if group else ()
        order = -np.array([inputs[index].limit for index in indices], np.int32)
        rests = [inputs[index].ids[len(prefix) :] for index in indices]
        for chosen, batch in batches.buckets(rests, budget, engine.partitioner.rows(), order, count * length):
            members = np.array(indices)[chosen]
            if count:
                batch = {**batch, **_continuations([inputs[each] for each in members], batch["lengths"], count, length)}
            waiting.append(Waiting(members, batch, prefix))
    return waiting


def _continuations(inputs: Sequence[Input], lengths: np.ndarray, count: int, length: int) -> Batch:
    tokens, unscored = np.full((len(lengths), count, length), -1, np.int32), np.zeros(len(lengths), np.int32)
    for row, each in enumerate(inputs):
        unscored[row] = each.unscored
        for number, ids in enumerate(each.continuations):
            tokens[row, number, : len(ids)] = ids
    return {"continuations": tokens, "unscored": unscored}


def _power(count: int) -> int:
    """The least power of two that is not below a count, 0 of 0."""
    return 1 << (count - 1).bit_length() if count else 0


def shared_prefix(rows: Sequence[list[int]]) -> tuple[int, ...]:
    """Returns the ids that all rows start with, less than a whole row; none if they are too few to be worth it."""
    first, last = min(rows), max(rows)  # in the order of lists, all others start with what these two share
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    prefix = tuple(token for token, _ in alike)[: min(map(len, rows)) - 1]
    return prefix if len(rows) > 1 and len(prefix) >= LEAST_PREFIX else ()


def prefix_state(engine: Engine, prefix: tuple[int, ...], known: dict[tuple[int, ...], Any]) -> Any:
    """Returns the decoding state of one row that holds a prefix, kept in `known`; None without a prefix."""
    if prefix and prefix not in known:
        known[prefix] = _prefix_state(engine.model, engine.params, engine.table, batches.padded([prefix]))
    return known.get(prefix)


@partial(jit_forward, static_argnames="model")
def _prefix_state(model: Model, params: Any, table: Array | None, batch: Any) -> Any:
    return model.prefill(params, table, batch, 0)[1]
