"""The paper's tasks, read through the real TFDS builders, which are prepared offline from rows of our own."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import seqio
import tensorflow_datasets as tfds

from promot_jax import main
from promot_jax.analysis.bootstrap import normalized_average
from promot_jax.data import fewshot, text
from promot_jax.errors import UserError
from promot_jax.tasks import register

with mock.patch.object(tfds, "load", side_effect=AssertionError), mock.patch.object(tfds, "builder", None):
    from promot_jax.tasks import paper  # reads nothing

ICL = ["cb", "wic", "trivia_qa", "web_questions", "wmt16_ende", "wmt16_enro", "xsum", "wiki_lingua"]
FINETUNE = ["rte", "snli", "openbookqa", "wmt14_enfr"]
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


def prepare(name: str, splits: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Has the real builder write its files from rows of ours."""
    builder = tfds.builder(name, data_dir=folder)
    if name.startswith("super_glue"):
        splits = {split: [row | {"idx": i} for i, row in enumerate(rows)] for split, rows in splits.items()}

    def generators(self: Any, manager: Any, *_: Any) -> dict[str, Any]:
        return {split: iter(enumerate(rows)) for split, rows in splits.items()}

    with mock.patch.object(type(builder), "_split_generators", generators):
        config = tfds.download.DownloadConfig(manual_dir=folder, compute_stats=tfds.download.ComputeStatsMode.SKIP)
        builder.download_and_prepare(download_config=config)


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("tfds")
    for name, reported, cases in CASES.values():
        rows = [row for row, _, _ in cases]
        train = [varied(rows[i % len(rows)], i) for i in range(TRAIN)]
        splits = {"train": train, "validation": [varied(rows[0], 100)], "test": [varied(rows[0], 200)]}
        if name.startswith("snli"):  # where annotators disagreed
            rows, train[3] = [*rows, PAIR | {"label": -1}], train[3] | {"label": -1}
        if name.startswith("web_questions"):
            del splits["validation"]
        prepare(name, splits | {reported: rows}, folder)
    seqio.set_tfds_data_dir_override(str(folder))
    yield
    seqio.set_tfds_data_dir_override(None)


@pytest.mark.parametrize("name", CASES)
def test_worked_examples(name: str) -> None:
    expected = sorted((inputs, targets) for _, inputs, targets in CASES[name][2])

    examples = text.read(name, "test")

    assert sorted((e.inputs, e.targets) for e in examples) == expected
    assert len({e.id for e in examples}) == len(expected)
    assert sorted(e.targets for e in examples) == sorted(examples[0].labels or {e.targets for e in examples})
    assert {e.shots for e in examples} == {0}


@pytest.mark.parametrize("name", CASES)
def test_splits(name: str) -> None:
    """Nothing of one split is in another, and nothing is lost."""
    splits = {split: [e.inputs for e in text.read(name, split)] for split in register.SPLITS}

    assert sum(map(len, splits.values())) == len({inputs for split in splits.values() for inputs in split}) + (
        len(splits["test"]) - len(set(splits["test"]))
    )
    held_out = name in ("rte", "cb", "wic", "trivia_qa", "web_questions")
    assert len(splits["train"]) == (18 if held_out else 19 if name == "snli" else 20)
    assert len(splits["validation"]) == (2 if held_out else 1)


def test_sources_are_named_with_their_versions() -> None:
    assert {name: text.get(name).source.tfds_dataset.name for name in CASES} == {n: c[0] for n, c in CASES.items()}


def test_several_right_answers() -> None:
    right = {"trivia_qa": ["Jane Austen", "Austen", "Miss Austen"], "web_questions": ["Bill", "Charlie"]}
    for name, answers in right.items():
        task, (example,) = text.get(name), text.read(name, "test")
        raw = next(iter(task.get_dataset(None, "test", shuffle=False).as_numpy_iterator()))

        assert list(example.answers) == answers
        for features in (raw, {"answers": example.answers}):  # as SeqIO's evaluator hands them over, and as ours does
            assert task.postprocess_fn(example.targets, example=features, is_target=True) == answers
        (metric,) = task.metric_fns
        assert [metric([answers], [said]) for said in (f"the {answers[1]}!", "Nobody")] == [
            {"exact_match": 100.0},
            {"exact_match": 0.0},
        ]


def test_metrics() -> None:
    scored: dict[tuple[str, ...], set[str]] = {}
    for name in CASES:
        scored.setdefault(tuple(getattr(fn, "name", "bleu") for fn in text.get(name).metric_fns), set()).add(name)

    assert scored == {
        ("accuracy",): {"rte", "snli", "openbookqa", "cb", "wic"},
        ("exact_match",): {"trivia_qa", "web_questions"},
        ("bleu",): {"wmt14_enfr", "wmt16_ende", "wmt16_enro"},
        ("rouge2",): {"xsum", "wiki_lingua"},
    }


@pytest.mark.parametrize(
    ("name", "output", "answer"),
    [
        ("rte", " True", "True"),
        ("rte", "False question: is it?", "False"),
        ("rte", "true", "true"),  # another token
        ("rte", "It is True", "It is True"),  # only the first counts
        ("cb", "Neither. True", "Neither"),
        ("snli", "Neither", "Neither"),
        ("wic", "False", "False"),
        ("openbookqa", " B", "B"),
        ("openbookqa", "B) cold Q: Fire is A) hot", "B"),
        ("openbookqa", "a star", "a star"),
        ("trivia_qa", "Paris Q: Who? A: Me", "Paris Q: Who? A: Me"),
        ("trivia_qa", "Q: Where? A: Paris Q: Who? A: Me", "Q: Where? A: Paris"),
        ("web_questions", " Paris \nQ: Who? A:", "Paris"),
        ("wmt14_enfr", "Translate x Translate y Translate z", "Translate x"),
        ("wmt16_enro", "Cerul. Translate English", "Cerul. Translate English"),
        ("xsum", "Article: a Article: b", "Article: a"),
        ("wiki_lingua", "Boil it. Article: b Article: c", "Boil it. Article: b"),
    ],
)
def test_postprocessing(name: str, output: str, answer: str) -> None:
    for task in (name, f"{name}_4shot"):
        assert text.get(task).postprocess_fn(output, example={}, is_target=False) == answer


@pytest.mark.parametrize("suffix", ["", "_0shot", "_1shot", "_4shot", "_9shot"])
def test_mixtures(suffix: str) -> None:
    assert text.task_names(f"icl{suffix}") == [f"{name}{suffix}" for name in ICL]
    assert text.task_names(f"rte_enfr{suffix}") == [f"rte{suffix}", f"wmt14_enfr{suffix}"]
    assert {text.base_task(name) for name in text.task_names(f"icl{suffix}")} == set(ICL)


def test_seqios_own_entry_point_reads_the_mixture() -> None:
    data = seqio.get_dataset(
        "icl_4shot",
        {"inputs": None, "targets": None},
        seqio.PassThroughFeatureConverter(),
        dataset_split="test",
        shuffle=False,
        num_epochs=1,
    )
    first = next(data.as_numpy_iterator())
    assert first["shots"] == 4 and set(first) == set(text.FEATURES)


def test_shots_are_registered_beforehand() -> None:
    for name in [*ICL, *FINETUNE]:
        assert {f"{name}_1shot", f"{name}_4shot"} <= set(seqio.TaskRegistry.names())
    assert {"icl", "icl_1shot", "icl_4shot", "rte_enfr_1shot"} <= set(seqio.MixtureRegistry.names())


def raw_ids(name: str, **options: Any) -> list[bytes]:
    data = text.get(name).get_dataset(None, "train", **options)
    return [element["id"] for element in data.as_numpy_iterator()]


@pytest.mark.parametrize("name", ["rte", "web_questions", "wmt14_enfr"])
def test_shuffling_and_sharding_change_no_exemplar(name: str) -> None:
    stored = raw_ids(name, shuffle=False)
    shuffled = raw_ids(name, shuffle=True, seed=3)
    shards = [raw_ids(name, shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]

    assert shuffled != stored and sorted(shuffled) == sorted(stored) == sorted(itertools.chain(*shards))
    pool = {example.id.encode(): example for example in text.read(name, "train")}
    (query, *_) = text.read(f"{name}_4shot", "test")
    orders = [[pool[i] for i in order] for order in (stored, shuffled, itertools.chain(*shards))]
    chosen = [fewshot.choose(name, 0, query.id, order, 4) for order in orders]
    drawn = [fewshot.draw(name, 0, query, fewshot.distinct(order), 4) for order in orders]
    assert chosen[0] == chosen[1] == chosen[2] and len({e.id for e in chosen[0]}) == 4
    assert drawn[0] == drawn[1] == drawn[2] and len({e.id for e in drawn[0]}) == 4


@pytest.mark.parametrize("name", FINETUNE)
def test_training_with_one_exemplar_in_front(name: str) -> None:
    pool = {f"{e.inputs} {e.targets}": e for e in text.read(name, "train")}
    stream = fewshot.WithExemplars(text.stream(f"{name}_1shot", "train", seed=0), 0, len, 10_000)

    by_id: dict[str, set[str]] = {}
    ids: list[str] = []
    for example in itertools.islice(stream, 60):
        exemplar, query = example.inputs.split("\n\n")
        assert pool[f"{query} {example.targets}"].id == example.id != pool[exemplar].id
        by_id.setdefault(example.id, set()).add(exemplar)
        ids.append(example.id)
    assert {len(exemplars) for exemplars in by_id.values()} == {1} and len(by_id) > len(pool) // 2
    assert len(set().union(*by_id.values())) > len(pool) // 3
    again = text.stream(f"{name}_1shot", "train", seed=0)
    assert [e.id for e in itertools.islice(again, 20)] == ids[:20]  # whatever was read before


def test_the_mixture_of_two_tasks_with_one_exemplar() -> None:
    stream = fewshot.WithExemplars(text.stream("rte_enfr_1shot", "train", seed=0), 0, len, 10_000)

    examples = list(itertools.islice(stream, 60))

    assert {e.task for e in examples} == {"rte_1shot", "wmt14_enfr_1shot"}
    for example in examples:
        exemplar, query = example.inputs.split("\n\n")
        assert ("Translate" in exemplar) == ("Translate" in query) == (example.task == "wmt14_enfr_1shot")


def test_only_articles_are_shortened() -> None:
    for name in CASES:
        (example, *_) = text.read(name, "test")
        if name in ("xsum", "wiki_lingua"):
            composed, dropped = fewshot.compose(example, [example], lambda s: len(s.split()), 6)
            assert composed == " ".join(example.inputs.split(" ")[:3]) + " One sentence summary:"
            assert dropped == 1
        else:
            with pytest.raises(UserError, match="over the limit of 2: allow longer inputs"):
                fewshot.compose(example, [], lambda s: len(s.split()), 2)


def test_documented() -> None:
    """The table names what is registered, and every command trains on a registered task with settings that bind."""
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text("utf-8")

    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    assert {row[0]: row[1] for row in rows if row[0] != "rte_enfr"} == {name: case[0] for name, case in CASES.items()}
    options = shlex.split(re.search('PAPER="(.*?)"', page, re.DOTALL)[1])  # type: ignore[index]
    settings = [s for name in ("finetune.gin", "paper.gin") for s in main.read(main.gin_folder() / name)]
    for line in re.findall(r"PAPER (--workdir=.*\n.*)", page):
        given = [o.removeprefix("--gin.") for o in options + shlex.split(line) if o.startswith("--gin.")]
        bound = settings + [main.read_override(*option.split("=", 1)) for option in given]
        experiment = main.bind({setting.key: setting for setting in bound}).keywords["experiment"]
        assert text.get(experiment.task).splits and text.get(experiment.icl_mixture).splits
        assert experiment.modules == paper.__name__ and experiment.checkpoint == "MODEL"
    assert len(re.findall(r"PAPER --workdir", page)) == 5


def test_data_that_cannot_be_had() -> None:
    source = register.TfdsSource("xsum:1.1.0", train="train", validation="validation", test="test")
    reason = AssertionError("Manual directory\n  does not exist")

    with (
        mock.patch.object(tfds, "load", side_effect=reason),
        pytest.raises(UserError, match=r"TFDS cannot read xsum:1\.1\.0 \(Manual directory does not exist\): prepare"),
    ):
        source.get_dataset("train")


# The rows of the paper's table on RTE: pretrained, standard fine-tuning, ProMoT, ProMoT + 1-shot; 1-shot and 4-shot.
PUBLISHED = {
    "cb": (46.43, 51.79, 73.21, 82.14, 66.07, 67.86, 83.93, 82.14),
    "wic": (49.69, 49.69, 50.00, 50.16, 51.41, 53.61, 51.25, 50.63),
    "trivia_qa": (17.58, 19.02, 0.15, 0.11, 17.64, 18.66, 17.82, 19.62),
    "web_questions": (9.70, 13.04, 0.05, 0.05, 11.07, 13.19, 10.14, 12.11),
    "wmt16_ende": (3.97, 8.83, 0, 0, 2.02, 3.69, 2.26, 4.89),
    "wmt16_enro": (1.82, 3.92, 0, 0, 0.70, 0.96, 0.87, 1.87),
    "xsum": (6.41, 2.35, 0, 0, 7.02, 7.01, 6.94, 3.93),
    "wiki_lingua": (4.59, 1.33, 0, 0, 4.84, 4.90, 4.87, 3.43),
}
AVERAGES = (17.52, 18.75, 15.43, 16.56, 20.10, 21.24, 22.26, 22.33)


@pytest.mark.parametrize("column", range(len(AVERAGES)))
def test_the_normalised_average_is_the_papers(column: int) -> None:
    assert list(PUBLISHED) == ICL
    average = normalized_average({name: scores[column] for name, scores in PUBLISHED.items()})
    assert average == pytest.approx(AVERAGES[column], abs=0.0051)
