"""Post-processors: from a model's raw output to the answer that is scored.

A post-processor has SeqIO's signature, `fn(output, example=..., is_target=...)`. Both keywords are optional, because
labels and prefix are fixed when the task is registered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from promot_jax.decoding.settings import Decoding

# An answer is one line: a run with another `Decoding.stop` takes longer and has the same scores.
STOP = Decoding.stop
Postprocess = Callable[..., str | list[str]]


def cut(output: str, prefix: str = "") -> str:
    """Returns the text before the stop sequence and before the second occurrence of the task's prefix, stripped."""
    answer = output.split(STOP, 1)[0]
    if prefix:
        answer = prefix.join(answer.split(prefix, 2)[:2])
    return answer.strip()


def text(prefix: str = "") -> Postprocess:
    """Returns the post-processor of a task without a label set: the output, `cut` at stop sequence and prefix.

    The target becomes the list of all right answers if the example has `answers`. White space around a target is left
    out, as around outputs.
    """

    def postprocess(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str | list[str]:
        if not is_target:
            return cut(output, prefix)
        answers = [a.decode() if isinstance(a, bytes) else str(a) for a in (example or {}).get("answers", ())]
        return [answer.strip() for answer in answers] or output.strip()

    return postprocess


def whole(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
    """Post-processor of a task whose answers have several lines: the output without white space around it."""
    del example, is_target
    return output.strip()


def label(labels: Sequence[str], prefix: str = "", ignore_case: bool = True) -> Postprocess:
    """Returns the post-processor of a task with a label set: the label that the output starts with, else its cut.

    Only the output's first word counts (the first n words for a label of n words). White space around labels and
    targets is left out, as around outputs, and a target that is a label but for ignored case becomes that label.

    Args:
      labels: the label set. A longer label wins over its own beginning ("North America" over "North").
      prefix: the task's prefix, as for `text`.
      ignore_case: whether case is ignored; with labels such as "A", the article "a" would then be a label.
    """
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    names = sorted((name.strip() for name in labels), key=len, reverse=True)
    patterns = [(name, re.compile(re.escape(name) + r"(?!\w)", flags)) for name in names]

    def postprocess(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
        del example
        if is_target:
            target = output.strip()
            return next((name for name, pattern in patterns if pattern.fullmatch(target)), target)
        answer = cut(output, prefix)
        return next((name for name, pattern in patterns if pattern.match(answer)), answer)

    return postprocess
