"""Tasks whose inputs are as long as those of known data sets, for the benchmark of packing; the texts mean nothing."""

import numpy as np

from promot_jax.tasks import metrics, register, templates

# Tokens of an input: median and spread (of the logarithm), and the longest. RTE has premises of one to several
# sentences, question answering with options (OpenbookQA) has short ones.
LENGTHS = {"rte_like": (65, 0.6, 240), "qa_like": (45, 0.35, 200)}
_WORDS = tuple("the film was good and a cast of old songs made all the people in this town end".split())  # noqa: SIM905


def _rows(name: str, split: str) -> list[dict[str, str]]:
    rng = np.random.default_rng([len(split), len(name)])
    median, spread, longest = LENGTHS[name]
    lengths = np.clip(rng.lognormal(np.log(median), spread, 512), 8, longest).astype(int)
    return [
        {"id": str(i), "text": " ".join(rng.choice(_WORDS, length - 4)), "answer": ("yes", "no")[i % 2]}
        for i, length in enumerate(lengths)
    ]


for _name in LENGTHS:
    register.register(
        _name,
        lambda split, name=_name: _rows(name, split),
        templates.labelled("Text", "Label", "text", "answer"),
        [metrics.accuracy],
        labels=("yes", "no"),
    )
