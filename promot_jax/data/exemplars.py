"""Few-shot prompts: which exemplars an example gets, and the text they make together."""

import bisect
import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence

from promot_jax.data import examples as text
from promot_jax.data.examples import Example, stable_hash
from promot_jax.errors import UserError

SEPARATOR = "\n\n"


def choose(
    task: str, seed: int, example_id: str, pool: Sequence[Example], k: int, inputs: str | None = None
) -> list[Example]:
    """Returns k exemplars for an example, from a pool (the training split) whose order does not matter.

    Every pool member gets a rank from a hash of (task, seed, example id, its own id); the k lowest are taken, lowest
    last. So fewer shots are always the last of more shots: a prompt that lost its first exemplar for want of room is
    the prompt with one shot less.

    Args:
      task: the task's name, without its `_<k>shot` ending when 1-shot and 4-shot prompts should share exemplars.
      seed: another seed, other exemplars.
      example_id: the example the prompt is for; it is never its own exemplar.
      pool: candidates; of those with equal inputs one at most is taken.
      k: how many.
      inputs: of the example; a candidate with the same ones, which would give the answer away, is left out.

    Raises:
      UserError: when the pool is too small.
    """
    if not k:
        return []
    distinct: dict[str, Example] = {}
    for candidate in pool:
        if candidate.id != example_id and candidate.inputs != inputs:
            held = distinct.setdefault(candidate.inputs, candidate)
            if candidate.id < held.id:
                distinct[candidate.inputs] = candidate
    if len(distinct) < k:
        raise UserError(f"task {task!r} has {len(distinct)} training examples to draw from, too few for {k} shots")
    ranked = heapq.nsmallest(k, distinct.values(), key=lambda e: (stable_hash(task, str(seed), example_id, e.id), e.id))
    return ranked[::-1]


def draw(task: str, seed: int, example: Example, pool: Sequence[Example], k: int) -> list[Example]:
    """Returns k exemplars as `choose` does, of the same properties, in a time that does not grow with the pool.

    `choose` ranks the whole pool for one example: too slow for every example of a training run. This looks up places
    that a hash of (task, seed, example id) gives, and takes the next one where a place is no choice.

    Args:
      task: the task's name without its `_<k>shot` ending.
      seed: another seed, other exemplars.
      example: what the exemplars are for; neither it nor an example of equal inputs is among them.
      pool: candidates as `distinct` returns them.
      k: how many.

    Raises:
      UserError: when the pool is too small.
    """
    chosen: list[Example] = []
    for number in range(k):
        first = int(stable_hash(task, str(seed), example.id, str(number)), 16)
        places = (pool[(first + i) % len(pool)] for i in range(len(pool)))
        taken = {example.inputs, *(one.inputs for one in chosen)}
        found = next((one for one in places if one.id != example.id and one.inputs not in taken), None)
        if found is None:
            raise UserError(f"task {task!r} has too few training examples to draw {k} shots from ({len(pool)})")
        chosen.append(found)
    return chosen[::-1]


def distinct(pool: Sequence[Example]) -> list[Example]:
    """Returns the pool in an order that does not depend on the given one, one example for equal inputs."""
    first = {one.inputs: one for one in sorted(pool, key=lambda e: (e.id, e.targets), reverse=True)}
    return sorted(first.values(), key=lambda e: (e.id, e.inputs))


class WithExemplars:
    """A training stream whose k-shot examples have their exemplars in front (the paper's "+ 1-shot").

    An example is the same whenever it comes by: its exemplars depend on (task, seed, example id) only. They come from
    `text.pool`. `dropped` counts those that did not fit.
    """

    def __init__(self, examples: Iterator[Example], seed: int, count_tokens: Callable[[str], int], max_tokens: int):
        """Composes examples as they come.

        Args:
          examples: a training stream; what asks for no shots passes as it is.
          seed: chooses the exemplars.
          count_tokens: number of tokens the model makes of an input text.
          max_tokens: room for an input. One that does not fit alone passes as it is, for the batches to leave it out.
        """
        self.dropped = 0
        self._examples, self._seed = examples, seed
        self._count_tokens, self._max_tokens = count_tokens, max_tokens
        self._pools: dict[str, list[Example]] = {}

    def __iter__(self) -> Iterator[Example]:
        """Returns itself: a stream is read once."""
        return self

    def __next__(self) -> Example:
        """Returns the next example, composed."""
        example = next(self._examples)
        if not example.shots or self._count_tokens(example.inputs) > self._max_tokens:
            return example
        task = text.base_task(example.task)
        if task not in self._pools:
            self._pools[task] = distinct(text.pool(task))
        exemplars = draw(task, self._seed, example, self._pools[task], example.shots)
        prompt, dropped = compose(example, exemplars, self._count_tokens, self._max_tokens)
        self.dropped += dropped
        return dataclasses.replace(example, inputs=prompt)


def compose(
    example: Example, exemplars: Sequence[Example], count_tokens: Callable[[str], int], max_tokens: int
) -> tuple[str, int]:
    """Returns the prompt, exemplars and then the query, and how many exemplars did not fit.

    Whole exemplars are left out, the first ones first, until the prompt has at most `max_tokens` tokens. The query is
    shortened only when it does not fit alone and names a `suffix` (articles to summarise): then words in front of the
    suffix are left out from the last one on.

    Args:
      example: the query.
      exemplars: as `choose` returns them.
      count_tokens: number of tokens the model makes of a text.
      max_tokens: room for the prompt, in tokens.

    Raises:
      UserError: when the query alone does not fit and may not be shortened.
    """
    shots = [f"{e.inputs} {e.targets}" for e in exemplars]
    for dropped in range(len(shots) + 1):
        prompt = SEPARATOR.join([*shots[dropped:], example.inputs])
        tokens = count_tokens(prompt)
        if tokens <= max_tokens:
            return prompt, dropped
    if example.suffix:
        words = example.inputs.removesuffix(example.suffix).split(" ")
        kept = bisect.bisect_right(
            range(len(words)), max_tokens, key=lambda n: count_tokens(" ".join(words[: n + 1]) + example.suffix)
        )
        if kept:
            return " ".join(words[:kept]) + example.suffix, len(shots)
    raise UserError(
        f"example {example.id!r} of task {example.task!r} is {tokens} tokens long without any exemplar, "
        f"over the limit of {max_tokens}: allow longer inputs"
    )
