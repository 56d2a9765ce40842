"""Few-shot prompts: which exemplars an example gets, and the text they make together."""

import heapq
from collections.abc import Callable, Sequence

from promot_jax.data.text import Example, stable_hash
from promot_jax.errors import UserError

SEPARATOR = "\n\n"


def choose(task: str, seed: int, example_id: str, pool: Sequence[Example], k: int) -> list[Example]:
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

    Raises:
      UserError: when the pool is too small.
    """
    if not k:
        return []
    distinct: dict[str, Example] = {}
    for candidate in pool:
        if candidate.id != example_id:
            held = distinct.setdefault(candidate.inputs, candidate)
            if candidate.id < held.id:
                distinct[candidate.inputs] = candidate
    if len(distinct) < k:
        raise UserError(f"task {task!r} has {len(distinct)} training examples to draw from, too few for {k} shots")
    ranked = heapq.nsmallest(k, distinct.values(), key=lambda e: (stable_hash(task, str(seed), example_id, e.id), e.id))
    return ranked[::-1]


def compose(
    example: Example, exemplars: Sequence[Example], count_tokens: Callable[[str], int], max_tokens: int
) -> tuple[str, int]:
    """Returns the prompt, exemplars and then the query, and how many exemplars did not fit.

    Whole exemplars are left out, the first ones first, until the prompt has at most `max_tokens` tokens; the query is
    never shortened.

    Args:
      example: the query.
      exemplars: as `choose` returns them.
      count_tokens: number of tokens the model makes of a text.
      max_tokens: room for the prompt, in tokens.

    Raises:
      UserError: when the query alone does not fit.
    """
    shots = [f"{e.inputs} {e.targets}" for e in exemplars]
    for dropped in range(len(shots) + 1):
        prompt = SEPARATOR.join([*shots[dropped:], example.inputs])
        tokens = count_tokens(prompt)
        if tokens <= max_tokens:
            return prompt, dropped
    raise UserError(
        f"example {example.id!r} of task {example.task!r} is {tokens} tokens long without any exemplar, "
        f"over the limit of {max_tokens}: allow longer inputs"
    )
