"""Few-shot prompts: draws exemplars for an example and composes the text of both."""

import bisect
import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence

from promot_jax.data import examples as text
from promot_jax.data.encoding import joined
from promot_jax.data.examples import Example, stable_hash
from promot_jax.data.vocabularies import controls
from promot_jax.errors import UserError

SEPARATOR = "\n\n"


def choose(
    task: str, seed: int, example_id: str, pool: Sequence[Example], k: int, inputs: str | None = None
) -> list[Example]:
    """Returns k exemplars for an example, from a pool (the training split) whose order does not matter.

    Every member of the pool is ranked by a hash of (task, seed, example id, its own id). The k lowest are taken, the
    lowest last, so fewer shots are always the last of more shots: dropping the first exemplar of a prompt that is too
    long gives the prompt with one shot less.

    Args:
      task: the task's name, without its `_<k>shot` ending if 1-shot and 4-shot prompts should share exemplars.
      seed: another seed, other exemplars.
      example_id: the example that the prompt is for; it is never its own exemplar.
      pool: candidates; of those with equal inputs one at most is taken.
      k: number of exemplars.
      inputs: of the example; candidates with equal inputs, which would reveal the answer, are left out.

    Raises UserError if the pool is too small.
    """
    if not k:
        return []
    by_inputs: dict[str, Example] = {}
    for candidate in pool:
        if candidate.id != example_id and candidate.inputs != inputs:
            first = by_inputs.setdefault(candidate.inputs, candidate)
            if candidate.id < first.id:
                by_inputs[candidate.inputs] = candidate
    if len(by_inputs) < k:
        raise UserError(f"task {task!r} has {len(by_inputs)} training examples to draw from, too few for {k} shots")
    key = (task, str(seed), example_id)
    return heapq.nsmallest(k, by_inputs.values(), key=lambda e: (stable_hash(*key, e.id), e.id))[::-1]


def draw(task: str, seed: int, example: Example, pool: Sequence[Example], k: int) -> list[Example]:
    """Returns k exemplars with the properties of `choose`, in a time that does not grow with the pool.

    `choose` ranks the whole pool for one example, which is too slow for every example of a training run. This starts at
    places given by a hash of (task, seed, example id) and takes the next candidate that is allowed.

    The arguments and errors are those of `choose`, with the whole example and a pool as `distinct` returns it.
    """
    chosen: list[Example] = []
    for number in range(k):
        first = int(stable_hash(task, str(seed), example.id, str(number)), 16)
        used = {example.inputs, *(exemplar.inputs for exemplar in chosen)}
        candidates = (pool[(first + i) % len(pool)] for i in range(len(pool)))
        exemplar = next((e for e in candidates if e.id != example.id and e.inputs not in used), None)
        if exemplar is None:
            raise UserError(f"task {task!r} has too few training examples to draw {k} shots from ({len(pool)})")
        chosen.append(exemplar)
    return chosen[::-1]


def distinct(pool: Sequence[Example]) -> list[Example]:
    """Returns one example for equal inputs, in an order that does not depend on the given one."""
    first = {e.inputs: e for e in sorted(pool, key=lambda e: (e.id, e.targets), reverse=True)}
    return sorted(first.values(), key=lambda e: (e.id, e.inputs))


class WithExemplars:
    """A training stream that prepends exemplars to its k-shot examples (the paper's "+ 1-shot").

    The exemplars depend on (task, seed, example id) only and come from `text.pool`. `dropped` counts exemplars that did
    not fit.
    """

    def __init__(self, examples: Iterator[Example], seed: int, count_tokens: Callable[[str], int], max_tokens: int):
        """Takes a stream.

        Args:
          examples: a training stream; examples without shots pass unchanged.
          seed: chooses the exemplars.
          count_tokens: number of tokens of an input text.
          max_tokens: limit of an input. A longer example passes unchanged, and the batches leave it out.
        """
        self.dropped = 0
        self._examples, self._seed = examples, seed
        self._count_tokens, self._max_tokens = count_tokens, max_tokens
        self._pools: dict[str, list[Example]] = {}

    def __iter__(self) -> Iterator[Example]:
        """Returns itself."""
        return self

    def __next__(self) -> Example:
        """Returns the next example, with its exemplars."""
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
    """Returns the prompt, exemplars and then the query, and how many exemplars were dropped.

    Whole exemplars are dropped, the first ones first, until the prompt has at most `max_tokens` tokens. The query is
    shortened only if it does not fit alone and has a `suffix` (articles to summarise): then the last words before the
    suffix are left out. Raises UserError if the query alone does not fit and may not be shortened.
    """
    shots = [joined(e.inputs, e.targets) for e in exemplars]
    for dropped in range(len(shots) + 1):
        prompt = SEPARATOR.join([*shots[dropped:], example.inputs])
        prompt = prompt[:1] + prompt[1:].replace(controls.BEGIN, "")
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
