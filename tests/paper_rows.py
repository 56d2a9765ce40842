"""The paper's data sets with a few rows of ours: the real TFDS builders write them, without a network."""

from pathlib import Path
from typing import Any
from unittest import mock

import tensorflow_datasets as tfds

PAIR = {"premise": "Nobody was at home.", "hypothesis": "The house was empty."}
MEANT = "Nobody was at home. question: The house was empty. Is it true or false or neither? answer:"
STEM = {"stem": "Ice is", "choice_A": "hot", "choice_B": "cold", "choice_C": "loud", "choice_D": "a star"}
WIKI = {"gem_id": "w", "gem_parent_id": "w", "source_aligned": {"en": "Boil it."}, "target_aligned": {"en": "Boil."}}


def trivia(question: str, value: str, *aliases: str) -> dict[str, Any]:
    """A row in the builder's schema."""
    normal = {"matched_wiki_entity_name": "", "normalized_matched_wiki_entity_name": "", "normalized_value": "x"}
    answer = {"value": value, "aliases": list(aliases), "normalized_aliases": ["x"], "type": "t", **normal}
    lists = {"entity_pages": [], "search_results": []}
    return {"question": question, "question_id": "q", "question_source": "s", "answer": answer, **lists}


def openbook(answer: str) -> dict[str, Any]:
    return {
        "question": STEM | {"stem": f"Ice {answer} is"},
        "fact1": "f",
        "humanScore": 1.0,
        "clarity": 1.0,
        "turkIdAnonymized": "t",
        "answerKey": answer,
    }


def senses(word: str, label: str) -> dict[str, Any]:
    places = dict.fromkeys(("start1", "start2", "end1", "end2"), 0)
    return {"word": word, "sentence1": "A river bank.", "sentence2": "A bank of clouds.", "label": label, **places}


# By task: the TFDS name, the TFDS split that is reported on, and per row of it the input and target it becomes.
CASES: dict[str, tuple[str, str, list[tuple[dict[str, Any], str, str]]]] = {
    "rte": (
        "super_glue/rte:1.0.2",
        "validation",
        [
            (PAIR | {"label": "entailment"}, MEANT.replace(" or neither", ""), "True"),
            (
                {
                    "premise": "Weapons {0} were not found.",
                    "hypothesis": "Weapons were found.",
                    "label": "not_entailment",
                },
                "Weapons {0} were not found. question: Weapons were found. Is it true or false? answer:",
                "False",
            ),
        ],
    ),
    "cb": (
        "super_glue/cb:1.0.2",
        "validation",
        [
            (PAIR | {"label": "entailment"}, MEANT, "True"),
            (PAIR | {"label": "contradiction"}, MEANT, "False"),
            (PAIR | {"label": "neutral"}, MEANT, "Neither"),
        ],
    ),
    "snli": (
        "snli:1.1.0",
        "test",
        [
            (PAIR | {"label": "entailment"}, MEANT, "True"),
            (PAIR | {"label": "neutral"}, MEANT, "Neither"),
            (PAIR | {"label": "contradiction"}, MEANT, "False"),
        ],
    ),
    "wic": (
        "super_glue/wic:1.0.2",
        "validation",
        [
            (
                senses("bank", "False"),
                "A river bank. A bank of clouds. question: The word bank is used in the same way in the two "
                "sentences. Is it true or False? answer:",
                "False",
            ),
            (
                senses("river", "True"),
                "A river bank. A bank of clouds. question: The word river is used in the same way in the two "
                "sentences. Is it true or False? answer:",
                "True",
            ),
        ],
    ),
    "openbookqa": (
        "openbookqa:0.1.0",
        "test",
        [(openbook(a), f"Q: Ice {a} is A) hot B) cold C) loud D) a star A:", a) for a in "ABCD"],
    ),
    "trivia_qa": (
        "trivia_qa/rc.nocontext:1.1.0",
        "validation",
        [(trivia("Who wrote Emma?", "Jane Austen", "Austen", "Miss Austen"), "Q: Who wrote Emma? A:", "Jane Austen")],
    ),
    "web_questions": (
        "web_questions:1.0.0",
        "test",
        [
            (
                {"url": "u", "question": "who are the brothers of ron?", "answers": ["Bill", "Charlie"]},
                "Q: who are the brothers of ron? A:",
                "Bill",
            )
        ],
    ),
    "wmt14_enfr": (
        "wmt14_translate/fr-en:1.0.0",
        "test",
        [({"en": "The sky.", "fr": "Le ciel."}, "Translate English to French: The sky.", "Le ciel.")],
    ),
    "wmt16_ende": (
        "wmt16_translate/de-en:1.0.0",
        "test",
        [({"en": "The sky.", "de": "Der Himmel."}, "Translate English to German: The sky.", "Der Himmel.")],
    ),
    "wmt16_enro": (
        "wmt16_translate/ro-en:1.0.0",
        "test",
        [({"en": "The sky.", "ro": "Cerul."}, "Translate English to Romanian: The sky.", "Cerul.")],
    ),
    "xsum": (
        "xsum:1.1.0",
        "test",
        [
            (
                {"document": "A cat was stuck.\nIt is free.", "summary": "A cat is free."},
                "Article: A cat was stuck.\nIt is free. One sentence summary:",
                "A cat is free.",
            )
        ],
    ),
    "wiki_lingua": (
        "gem/wiki_lingua_english_en:1.1.0",
        "test",
        [
            (
                WIKI | {"source": "Boil the water.", "target": "Boil it.", "references": ["Boil it."]},
                "Article: Boil the water. One sentence summary:",
                "Boil it.",
            )
        ],
    ),
}
TRAIN = 20  # rows that every training split is prepared with


def varied(value: Any, number: int) -> Any:
    """The row with a number in all of its texts; classes stay."""
    if isinstance(value, dict):
        return {k: v if k in ("label", "answerKey") else varied(v, number) for k, v in value.items()}
    if isinstance(value, list):
        return [varied(item, number) for item in value]
    return f"{value} ({number})" if isinstance(value, str) else value


def prepare(name: str, splits: dict[str, list[dict[str, Any]]], folder: Path, shards: int = 1) -> None:
    """Has the real builder write its files from rows of ours, each split into so many."""
    builder = tfds.builder(name, data_dir=folder)
    if name.startswith("super_glue"):
        splits = {split: [row | {"idx": i} for i, row in enumerate(rows)] for split, rows in splits.items()}

    def generators(self: Any, manager: Any, *_: Any) -> dict[str, Any]:
        return {split: iter(enumerate(rows)) for split, rows in splits.items()}

    with mock.patch.object(type(builder), "_split_generators", generators):
        config = tfds.download.DownloadConfig(
            manual_dir=folder, compute_stats=tfds.download.ComputeStatsMode.SKIP, num_shards=shards
        )
        builder.download_and_prepare(download_config=config)


def prepare_all(folder: Path) -> None:
    """Prepares the data sets of the paper's tasks in a folder, for `TFDS_DATA_DIR`."""
    for name, reported, cases in CASES.values():
        rows = [row for row, _, _ in cases]
        train = [varied(rows[i % len(rows)], i) for i in range(TRAIN)]
        splits = {"train": train, "validation": [varied(rows[0], 100)], "test": [varied(rows[0], 200)]}
        if name.startswith("snli"):  # where annotators disagreed
            rows, train[3] = [*rows, PAIR | {"label": -1}], train[3] | {"label": -1}
        if name.startswith("web_questions"):
            del splits["validation"]
        prepare(name, splits | {reported: rows}, folder)
