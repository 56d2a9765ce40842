"""From a model's raw text to the answer that is scored.

A post-processor is called the way SeqIO does, `fn(output, example=..., is_target=...)`; the two keywords are optional
because everything it needs is fixed when the task is registered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from promot_jax.decoding.settings import Decoding

# An answer is one line, however a run decodes: with another `Decoding.stop` it takes longer and scores the same.
STOP = Decoding.stop
Postprocess = Callable[..., str | list[str]]


def cut(output: str, prefix: str = "") -> str:
    """Returns what stands before the stop sequence and before the second occurrence of the task's prefix, stripped."""
    answer = output.split(STOP, 1)[0]
    if prefix:
        first = answer.find(prefix)
        second = answer.find(prefix, first + len(prefix)) if first >= 0 else -1
        if second >= 0:
            answer = answer[:second]
    return answer.strip()


def text(prefix: str = "") -> Postprocess:
    """Returns the post-processor of an open task: the answer as it was written, cut at the stop sequence and prefix.

    The target becomes the list of all right answers when the example has `answers`.
    """

    def postprocess(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str | list[str]:
        if not is_target:
            return cut(output, prefix)
        answers = [a.decode() if isinstance(a, bytes) else str(a) for a in (example or {}).get("answers", ())]
        return answers or output

    return postprocess


def label(labels: Sequence[str], prefix: str = "", ignore_case: bool = True) -> Postprocess:
    """Returns the post-processor of a task with a label set: the label the output begins with, else the cut output.

    The output's first word decides (for a label of n words, its first n), whatever follows.

    Args:
      labels: the label set. Where one label begins another ("North", "North America"), the longer one is tried first.
      prefix: the task's prefix, as for `text`.
      ignore_case: take a label in other letters; with labels such as "A" an article would be one.
    """
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    patterns = [
        (name, re.compile(re.escape(name) + r"(?!\w)", flags)) for name in sorted(labels, key=len, reverse=True)
    ]

    def postprocess(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
        del example
        if is_target:
            return output
        answer = cut(output, prefix)
        return next((name for name, pattern in patterns if pattern.match(answer)), answer)

    return postprocess
