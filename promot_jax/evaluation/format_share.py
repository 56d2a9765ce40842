"""Format share: how far a model has collapsed onto the output format of the fine-tuned task (paper, figure 2).

A model fine-tuned to answer "True" or "False" ends up saying so to everything. The format share of an ICL task is the
percentage of its outputs that are one of the *fine-tuned* task's labels. A task whose own labels are among them would
have a high share without any collapse: the evaluator leaves it out (its format share is None).
"""

from collections.abc import Collection, Sequence

FINAL_PUNCTUATION = ".,;:!?…。、\uff0c\uff1b\uff1a\uff01\uff1f"  # the escapes are the full-width , ; : ! ?


def format_share(outputs: Sequence[str], labels: Collection[str]) -> float | None:
    """Percentage of outputs that are a label of the fine-tuned task.

    An output counts when it equals a label, case included, after whitespace around it and punctuation at its end are
    taken off (of the labels too). "True." and " True" count for the label "True"; "true", "True story" and "" do not.

    Args:
        outputs: post-processed outputs of one ICL task (cut at the task's prefix, markers of span corruption removed).
        labels: the label set of the fine-tuned task.

    Returns:
        On [0, 100]; None when the fine-tuned task is open (no labels), or there is no output.
    """
    if not labels or not outputs:
        return None
    known = {_bare(label) for label in labels}
    return 100.0 * sum(_bare(output) in known for output in outputs) / len(outputs)


def _bare(text: str) -> str:
    """Without whitespace around it and punctuation at its end, unless nothing would be left ("!" stays "!")."""
    text = text.strip()
    bare = text.rstrip(FINAL_PUNCTUATION + " \t\n\r")
    return bare or text
