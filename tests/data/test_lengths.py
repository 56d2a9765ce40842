"""Token lengths by class; the reference is the length of the encoded example."""

import pytest
import tiny

from promot_jax.data import lengths
from promot_jax.data.encoding import Encoder
from promot_jax.data.examples import read
from promot_jax.errors import UserError
from promot_jax.tasks import metrics, register, templates

pytestmark = pytest.mark.usefixtures("registry")
VOCABULARY = tiny.vocabulary()
ROWS = [
    {"text": "was good " * n, "label": label} for n, label in ((1, "bad"), (2, "bad"), (9, "surprising"), (1, "bad"))
]


def measured() -> lengths.Lengths:
    lengths.measure.cache_clear()
    register.register(
        "long",
        lambda _: ROWS,
        templates.Template("{text}:", "{label}"),
        [metrics.accuracy],
        labels=["bad", "surprising"],
    )
    return lengths.measure("long", "train", VOCABULARY, True)


def test_rows_classes_and_lengths() -> None:
    found = measured()
    encoder = Encoder.of(VOCABULARY, continues=True)
    tokens = [encoder.tokens(example) for example in read("long", "train")]
    assert sorted((row.inputs, row.targets) for row in found.rows) == sorted(
        (len(t.inputs), len(t.targets)) for t in tokens
    )
    most = max(len(t.inputs) for t in tokens)
    assert found.longest["targets"] == max(len(t.targets) for t in tokens)
    assert most <= found.longest["inputs"] < most + 8
    assert found.repeated == 1 and found.classes() == {"bad": 3, "surprising": 1}
    assert found.sentence().startswith("4 rows ('bad' 3, 'surprising' 1), 1 repeated; input tokens: median ")
    assert not found.left_out(found.longest)
    found.check("long", found.longest)


@pytest.mark.parametrize("short", ["inputs", "targets"])
def test_a_class_that_would_not_be_learnt(short: str) -> None:
    found = measured()
    of_class = next(row for row in found.rows if row.label == "surprising")
    limits = found.longest | {short: getattr(of_class, short) - 1}
    assert found.left_out(limits) == {"surprising": 1}
    least = f"at least {getattr(of_class, short)} {short[:-1]} tokens"
    says = rf"with the label 'surprising' fits TASK_FEATURE_LENGTHS = .* {least}"
    with pytest.raises(UserError, match=says):
        found.check("long", limits)
