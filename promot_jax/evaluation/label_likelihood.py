"""Scoring a label set by likelihood, as lm-eval's tasks of `output_type: multiple_choice`.

Each label is scored by the sum of its tokens' log-probabilities given the prompt. `acc` is the accuracy of the label
with the greatest sum, `acc_norm` that of the greatest sum divided by the label's number of characters (lm-eval 0.4,
`ConfigurableTask.process_results`; its `acc_bytes` divides by bytes, which is the same for ASCII labels).
"""

from collections.abc import Mapping, Sequence

Judged = tuple[Mapping[str, float], str]  # log-likelihoods by label, and the right label


def likeliest(likelihoods: Mapping[str, float], *, normalized: bool = False) -> str:
    """Returns the label with the greatest log-likelihood, the first of equals; `normalized` by its characters."""
    return max(likelihoods, key=lambda label: likelihoods[label] / (len(label) if normalized else 1))


def accuracies(judged: Sequence[Judged]) -> dict[str, float]:
    """Returns `acc` and `acc_norm` in percent, or nothing where no example has a label set."""
    scored = [(likelihoods, right) for likelihoods, right in judged if likelihoods]
    if not scored:
        return {}
    return {
        name: 100.0 * sum(likeliest(each, normalized=normalized) == right for each, right in scored) / len(scored)
        for name, normalized in (("acc", False), ("acc_norm", True))
    }
