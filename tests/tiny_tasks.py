"""Tasks of a few examples for a model of a few thousand weights; `MIXTURE_OR_TASK_MODULE = "tiny_tasks"`."""

from promot_jax.tasks import metrics, register, templates

SIZES = {"train": 24, "validation": 6, "test": 10}
OFFSETS = {"train": 0, "validation": 24, "test": 30}
NOUNS = ("film", "cast", "plot", "song", "end", "start", "joke", "shot")
THINGS = {"snow": "white", "coal": "black", "grass": "green", "sky": "blue", "rose": "red", "sun": "gold"}
ANIMALS = {"ant": "small", "bee": "small", "elk": "big", "yak": "big", "gnat": "small", "bear": "big"}


def reviews(split: str) -> list[register.Row]:
    """A review says what its label is."""
    rows = []
    for i in range(OFFSETS[split], OFFSETS[split] + SIZES[split]):
        label = ("good", "bad")[i * 7 % 5 % 2]
        rows.append({"id": f"r{i}", "noun": f"{NOUNS[i % 8]} {i}", "label": label})
    return rows


def pairs(table: dict[str, str], split: str) -> list[register.Row]:
    """Numbered things and what they are."""
    names = sorted(table)
    chosen = range(OFFSETS[split], OFFSETS[split] + SIZES[split])
    return [{"id": f"p{i}", "name": f"{names[i % 6]} {i}", "is": table[names[i % 6]]} for i in chosen]


REVIEW = templates.Template("Review: {noun} was {label}\nLabel:", "{label}", "Review:")
register.register("tiny_review", reviews, REVIEW, [metrics.accuracy], labels=["good", "bad"])
register.register(
    "tiny_colour",
    lambda split: pairs(THINGS, split),
    templates.labelled("Thing", "Colour", "name", "is"),
    [metrics.exact_match, metrics.token_f1],
)
register.register(
    "tiny_size",
    lambda split: pairs(ANIMALS, split),
    templates.labelled("Animal", "Size", "name", "is"),
    [metrics.accuracy],
    labels=["big", "small"],
)
register.register_mixture("tiny_icl", ["tiny_colour", "tiny_size"])
register.register_mixture("tiny_pair", {"tiny_review": 2.0, "tiny_size": 1.0})
register.register_mixture("tiny_trio", ["tiny_review", "tiny_size", "tiny_colour"])
PASSAGES = [f"{' '.join(NOUNS[i % 8] for i in range(n, n + 6))} number {n}." for n in range(12)]
register.register(
    "tiny_text", lambda _: [{"text": passage} for passage in PASSAGES], templates.Template("", "{text}"), []
)
