"""Generation for any number of inputs: the places of finished rows in a running batch go to waiting ones.

Inputs wait in batches of similar length, those with the longest outputs first. A prefill processes one of these batches
and puts its rows in free places of the running batch; a decode loop of fixed shape then appends tokens until as many
places are free as the next batch needs. Between two looks at the device, the host is free for finished outputs.

A step costs what the places of the running batch cost, free or not. So when nothing waits any more and three quarters
of the places are free, the rows that are left move to a batch of a quarter of the places. Size classes of inputs run
from short to long, and what is left of one class moves to the batch of the next. Few programs are compiled: a prefill
per shape of a waiting batch, a decode loop per size class, and one for each quarter in the last class.

Where likelihoods of continuations are asked for, the prefill computes them too: each input is processed once. A beam
search, which goes batch by batch, has its own prefill, so that it processes such inputs twice.

All hosts of a run take the same decisions: they look at the same gathered rows.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax.decoding.generate import Rows, begin, generate, put
from promot_jax.decoding.inputs import Engine, Input, Waiting, prefix_state, waiting_batches
from promot_jax.decoding.likelihood import of_batch, of_continuations
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed import hosts, preemption
from promot_jax.distributed.forward_programs import jit_forward
from promot_jax.distributed.partitioning import activations, constrain
from promot_jax.models import Model
from promot_jax.models.stack import CACHE, KEYS, apart

Array = jax.Array


class Output(NamedTuple):
    """What is generated for an input."""

    member: int  # index of the input
    ids: np.ndarray  # int32 `[max_tokens]`, -1 after the last
    likelihoods: np.ndarray | None  # of its continuations, float32 `[continuations]`; None without any


STEPS = 32  # longest stretch of decoding between two looks of the host
LEAST_STEPS = 8  # room for outputs in a cache is a power of two, this or more: few programs
LEAST_PLACES = 8  # a running batch gets no smaller: on a CPU, a step of fewer rows takes hardly less time


def generate_all(engine: Engine, inputs: Sequence[Input]) -> Iterator[Output]:
    """Generates for all inputs, and scores their continuations.

    Greedy outputs and likelihoods are those of each input alone, up to rounding.

    Yields:
        The output of each input, as they are finished, while the device goes on.

    Raises:
        UserError: an input is empty or too long.
        PreemptedError: between two stretches of decoding.
    """
    if engine.settings.beams > 1:
        yield from _in_batches(engine, inputs)
        return
    budget = min(engine.prefill_tokens, engine.cache_tokens // 4)  # a prefill fills a part of the running batch
    classes: dict[int, list[Waiting]] = {}
    for waiting in waiting_batches(inputs, budget, engine):
        classes.setdefault((waiting.width - 1).bit_length(), []).append(waiting)
    running = _Running(engine, inputs)
    for size in sorted(classes):
        yield from running.run(classes[size], is_last=size == max(classes))


def _in_batches(engine: Engine, inputs: Sequence[Input]) -> Iterator[Output]:
    """Beam search, batch by batch: a beam takes the memory of a row.

    Continuations count once per beam in the size of a batch, although they are scored after the search.
    """
    finished: list[Output] = []
    budget = engine.prefill_tokens // engine.settings.beams
    for waiting in waiting_batches([dataclasses.replace(each, group="") for each in inputs], budget, engine):
        limits, _ = _by_row(inputs, waiting)
        placed = engine.partitioner.batch(waiting.batch)
        bare = {name: placed[name] for name in ("tokens", "lengths")}
        ids = generate(
            engine.model, engine.settings, engine.params, engine.table, bare, engine.stops, limits, engine.key
        )
        scores = of_batch(engine.model, engine.params, engine.table, placed) if "continuations" in placed else None
        yield from finished
        finished = _outputs(inputs, waiting.members, ids, scores)
        preemption.check("during an evaluation")
    yield from finished


def _outputs(inputs: Sequence[Input], members: np.ndarray, ids: Array, scores: Array | None) -> list[Output]:
    """The outputs of a batch's rows; waits for the device."""
    likelihoods = repeat(None) if scores is None else hosts.whole(scores)
    return [
        Output(member, row, None if scored is None else scored[: len(inputs[member].continuations)])
        for member, row, scored in zip(members.tolist(), hosts.whole(ids), likelihoods, strict=False)
    ]


def _by_row(inputs: Sequence[Input], waiting: Waiting) -> tuple[np.ndarray, np.ndarray]:
    """Limits and seeds of a batch's rows, those of padding 1 and 0."""
    limits = np.ones(len(waiting.batch["lengths"]), np.int32)
    seeds = np.zeros(len(limits), np.uint32)
    for row, member in enumerate(waiting.members):
        limits[row], seeds[row] = inputs[member].limit, inputs[member].seed
    return limits, seeds


class _Running:
    """A running batch, and what waits for its places."""

    def __init__(self, engine: Engine, inputs: Sequence[Input]):
        """Takes what generates, and all inputs."""
        self._engine, self._inputs = engine, inputs
        self._params = apart(engine.params, engine.partitioner)  # for decoding steps
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._width = self._steps = 0  # room of a place, in tokens of the input and of the output
        self._rows: Any = None
        self._state: Any = None
        self._member = np.full(0, -1)  # the input of each place, -1 for a free one
        self._prefixes: dict[tuple[int, ...], Any] = {}
        self._scored: list[tuple[np.ndarray, Array]] = []  # inputs, and their likelihoods that are still on the device
        self._likelihoods: dict[int, np.ndarray] = {}  # of inputs whose outputs are not finished

    def run(self, waiting: Sequence[Waiting], *, is_last: bool) -> Iterator[Output]:
        """Yields outputs of a size class and of rows that are left of those before, as they are finished.

        Args:
            waiting: batches of similar width, wider than those of the classes before.
            is_last: whether to finish all outputs; otherwise up to a quarter of the rows are left for the next class.
        """

        def longest(each: Waiting) -> int:
            return max(self._inputs[member].limit for member in each.members)

        # Short outputs come last: then few rows are left that the others wait for.
        self._waiting.extend(sorted(waiting, key=longest, reverse=True))
        self._width = max(each.width for each in waiting)
        self._steps = max(self._steps, LEAST_STEPS, 1 << (max(map(longest, waiting)) - 1).bit_length())
        self._move(self._places(waiting))
        left = 0 if is_last else self._quarter()
        finished: list[Output] = []
        while self._waiting or self._active() > left:
            while self._waiting and len(self._member) - self._active() >= len(self._waiting[0].members):
                self._admit(self._waiting.popleft())
            self._advance(len(self._waiting[0].members) if self._waiting else len(self._member) - self._quarter())
            yield from finished  # the device is busy meanwhile
            finished = self._finished()
            if not self._waiting and 0 < self._active() <= self._quarter():
                self._move(self._quarter())
            preemption.check("during an evaluation")
        yield from finished

    def _places(self, waiting: Sequence[Waiting]) -> int:
        """Places of a batch for what waits and what is left, as many as the cache holds."""
        most = 1 << max(self._engine.cache_tokens // (self._width + self._steps), 1).bit_length() - 1
        needed = self._active() + sum(len(each.members) for each in waiting)
        rows = max(len(each.batch["lengths"]) for each in waiting)
        return self._rounded(max(rows, self._active(), min(most, 1 << (needed - 1).bit_length())))

    def _rounded(self, places: int) -> int:
        parts = self._engine.partitioner.rows()
        return -(-places // parts) * parts

    def _quarter(self) -> int:
        """Places of the next smaller batch, 0 if there is none."""
        quarter = self._rounded(len(self._member) // 4)
        return quarter if LEAST_PLACES <= quarter < len(self._member) else 0

    def _active(self) -> int:
        return int((self._member >= 0).sum())

    def _move(self, count: int) -> None:
        """Makes a running batch of `count` places, with the rows that are left."""
        engine, left = self._engine, np.flatnonzero(self._member >= 0)
        member = np.full(count, -1)
        member[: len(left)] = self._member[left]
        size = {"width": self._width, "steps": self._steps}
        if len(left):
            chosen = np.full(count, -1, np.int32)
            chosen[: len(left)] = left
            self._rows, self._state = _moved(engine.model, chosen, self._rows, self._state, **size)
        else:
            self._rows = self._state = None  # frees the memory
            self._rows, self._state = _empty(engine.model, engine.settings, self._params, count, **size)
        self._member = member

    def _admit(self, waiting: Waiting) -> None:
        engine = self._engine
        limits, seeds = _by_row(self._inputs, waiting)
        batch = engine.partitioner.batch({**waiting.batch, "limits": limits, "seeds": seeds})
        places = np.full(len(limits), len(self._member), np.int32)  # padding rows get none
        places[: len(waiting.members)] = np.flatnonzero(self._member < 0)[: len(waiting.members)]
        self._member[places[: len(waiting.members)]] = waiting.members
        self._rows, self._state, scores = _start(
            engine.model, engine.settings, engine.params, engine.table, engine.stops, engine.key, batch, places,
            prefix_state(engine, waiting.prefix, self._prefixes), self._rows, self._state,
        )  # fmt: skip
        if scores is not None:
            self._scored.append((waiting.members, scores))

    def _advance(self, wanted: int) -> None:
        engine = self._engine
        self._rows, self._state = _decode(
            engine.model, engine.settings, self._params, engine.stops, engine.key, wanted, self._rows, self._state
        )

    def _finished(self) -> list[Output]:
        """Outputs of the places that are done, which are free from now on; waits for the device."""
        places = np.flatnonzero(hosts.whole(self._rows.done) & (self._member >= 0))
        outputs = hosts.whole(self._rows.outputs)[places]
        members, self._member[places] = self._member[places].tolist(), -1
        for scored, scores in self._scored:
            for member, row in zip(scored.tolist(), hosts.whole(scores), strict=False):
                self._likelihoods[member] = row[: len(self._inputs[member].continuations)]
        self._scored.clear()
        return [
            Output(member, ids, self._likelihoods.pop(member, None))
            for member, ids in zip(members, outputs, strict=True)
        ]


@partial(jax.jit, static_argnames=("model", "settings", "count", "width", "steps"))
def _empty(model: Model, settings: Decoding, params: Any, count: int, width: int, steps: int) -> tuple[Rows, Any]:
    zeros = jnp.zeros(count, jnp.int32)
    rows = begin(settings, zeros, zeros.astype(jnp.uint32), jnp.ones(count, bool))
    return _pinned(model, (rows, model.empty(params, count, width, steps)))


@partial(jax.jit, static_argnames=("model", "width", "steps"))
def _moved(model: Model, chosen: Array, rows: Rows, state: Any, width: int, steps: int) -> tuple[Rows, Any]:
    """Returns a running batch with a place for each of `chosen`, int32: a place of another batch, -1 for a free one."""
    taken = jax.tree.map(lambda leaf: leaf[chosen], rows)
    taken = taken._replace(done=taken.done | (chosen < 0))
    return _pinned(model, (taken, model.move(state, chosen, width, steps)))


@partial(jit_forward, static_argnames=("model", "settings"), donate_argnames="state")
def _start(
    model: Model,
    settings: Decoding,
    params: Any,
    table: Array | None,
    stops: Array,
    key: Array,
    batch: Any,
    places: Array,
    prefix: Any,
    rows: Rows,
    state: Any,
) -> tuple[Rows, Any, Array | None]:
    """Processes a batch, chooses the first token of each row, and puts the rows in their places.

    Returns:
        The running batch, and the likelihoods of the batch's continuations, None where it has none.
    """
    scores = None
    if "continuations" in batch:
        scores, logits, new = of_continuations(model, params, table, batch, prefix)
    else:
        logits, new = model.prefill(params, table, batch, 0, prefix)
    fresh = put(begin(settings, batch["limits"], batch["seeds"], batch["lengths"] == 0), logits, settings, stops, key)
    rows = jax.tree.map(lambda leaf, added: leaf.at[places].set(added, mode="drop"), rows, fresh)
    return *_pinned(model, (rows, model.join(state, new, places))), scores


@partial(jax.jit, static_argnames=("model", "settings"), donate_argnames="state")
def _decode(
    model: Model, settings: Decoding, params: Any, stops: Array, key: Array, wanted: Array, rows: Rows, state: Any
) -> tuple[Rows, Any]:
    """Appends tokens until `wanted` places are done or free, at most `STEPS` times."""

    def goes_on(carry: tuple[Array, Rows, Any]) -> Array:
        return (carry[0] < STEPS) & (carry[1].done.sum() < wanted)

    def step(carry: tuple[Array, Rows, Any]) -> tuple[Array, Rows, Any]:
        count, rows, state = carry
        logits, state = model.step(params, state, rows.token)
        return count + 1, put(rows, logits, settings, stops, key), state

    return _pinned(model, jax.lax.while_loop(goes_on, step, (jnp.int32(0), rows, state))[1:])


def _pinned(model: Model, tree: Any) -> Any:
    """Shards all arrays of a running batch by their rows, always alike: so that each program is compiled once."""

    def pin(leaf: Array) -> Array:
        axes = {len(CACHE): CACHE, len(KEYS): KEYS}.get(leaf.ndim, ("batch", None)[: leaf.ndim])
        return constrain(leaf, *axes)

    with activations(model.partitioner):
        return jax.tree.map(pin, tree)
