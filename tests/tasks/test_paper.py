"""The paper's tasks, read through the real TFDS builders, which are prepared offline from rows of our own."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import paper_rows
import pytest
import seqio
import tensorflow_datasets as tfds

from promot_jax import main
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.config import binding, gin_files
from promot_jax.data import examples as text
from promot_jax.data.exemplars import WithExemplars, choose, compose, distinct, draw
from promot_jax.data.vocabularies.sentencepiece import ByteVocabulary
from promot_jax.decoding.output_text import first_span
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation import evaluator
from promot_jax.evaluation.sampler import Reply, Request, Sampler
from promot_jax.evaluation.settings import Evaluation
from promot_jax.models import T5Config, build
from promot_jax.results.bootstrap import normalized_average
from promot_jax.tasks import register

with mock.patch.object(tfds, "load", side_effect=AssertionError), mock.patch.object(tfds, "builder", None):
    from promot_jax.tasks import paper  # reads nothing

ICL = ["cb", "wic", "trivia_qa", "web_questions", "wmt16_ende", "wmt16_enro", "xsum", "wiki_lingua"]
FINETUNE = ["rte", "snli", "openbookqa", "wmt14_enfr"]
CASES = paper_rows.CASES


@pytest.fixture(name="data", scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tfds")
    paper_rows.prepare_all(folder)
    seqio.set_tfds_data_dir_override(str(folder))
    yield folder
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


RIGHT = {"trivia_qa": ["Jane Austen", "Austen", "Miss Austen"], "web_questions": ["Bill", "Charlie"]}


def test_several_right_answers() -> None:
    for name, answers in RIGHT.items():
        task, (example,) = text.get(name), text.read(name, "test")
        raw = next(iter(task.get_dataset(None, "test", shuffle=False).as_numpy_iterator()))

        assert list(example.answers) == answers
        for features in (raw, {"answers": example.answers}):  # as SeqIO's evaluator hands them over, and as ours does
            assert task.postprocess_fn(example.targets, example=features, is_target=True) == answers
        (metric,) = task.metric_fns
        assert [metric([answers], [prediction]) for prediction in (f"the {answers[1]}!", "Nobody")] == [
            {"exact_match": 100.0},
            {"exact_match": 0.0},
        ]


def test_trivia_qa_is_scored_as_its_official_script_does() -> None:
    """Punctuation becomes a space there; SQuAD's script, which web_questions goes by, deletes it."""
    found = {name: text.get(name).metric_fns[0]([["Spider Man"]], ["Spider-Man"]) for name in RIGHT}
    assert found == {"trivia_qa": {"exact_match": 100.0}, "web_questions": {"exact_match": 0.0}}


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


@pytest.mark.parametrize(
    ("name", "raw", "answer"),
    [  # its appendix B.2: what a T5 says between its sentinels, up to the second occurrence of the task's prefix
        ("trivia_qa", "<extra_id_0> Paris <extra_id_1> Q: Who?", "Paris"),
        ("trivia_qa", "<extra_id_0> Paris Q: Who? A: Me Q: Where? A: <extra_id_1>", "Paris Q: Who? A: Me"),
        ("web_questions", "so <extra_id_0> Q: Where? A: Rome Q: Who? <extra_id_1> x", "Q: Where? A: Rome"),
        ("wmt16_ende", "<extra_id_0> Der Himmel. Translate English: a Translate", "Der Himmel. Translate English: a"),
        ("xsum", "<extra_id_0> A cat is free. Article: It. Article: <extra_id_1>", "A cat is free. Article: It."),
        ("rte", "<extra_id_0> True <extra_id_1> False", "True"),
        ("cb", "<extra_id_0> Neither. <extra_id_1>", "Neither"),
        ("trivia_qa", "Paris", "Paris"),  # fine-tuned models leave the sentinels out
        ("trivia_qa", "<extra_id_1> Paris", ""),
    ],
)
def test_span_corruption_outputs(name: str, raw: str, answer: str) -> None:
    prediction = text.get(name).postprocess_fn(first_span(raw), example={}, is_target=False)
    assert prediction == answer


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
        assert {f"{name}_0shot", f"{name}_1shot", f"{name}_4shot"} <= set(seqio.TaskRegistry.names())
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
    chosen = [choose(name, 0, query.id, order, 4) for order in orders]
    drawn = [draw(name, 0, query, distinct(order), 4) for order in orders]
    assert chosen[0] == chosen[1] == chosen[2] and len({e.id for e in chosen[0]}) == 4
    assert drawn[0] == drawn[1] == drawn[2] and len({e.id for e in drawn[0]}) == 4


def scored(shuffle: bool) -> tuple[list[Any], list[Any]]:
    """Scores two tasks of the data at hand, by a model whose answer is a function of the whole prompt."""

    def answer(self: Sampler, params: Any, requests: list[Request]) -> list[Reply]:
        codes = [int(text.stable_hash(request.text), 16) for request in requests]
        return [Reply(index, ["Who", "Paris", "True", "False"][code % 4], {}) for index, code in enumerate(codes)]

    def get_dataset(task: seqio.Task, *args: Any, **options: Any) -> Any:
        return read(task, *args, **options | {"shuffle": shuffle, "seed": 3})

    read = seqio.Task.get_dataset
    base = Pretrained(build(T5Config(384, 16, 2, 1, 1, 8, 24)), {}, ByteVocabulary(), "", "", "", {})
    evaluator._read.cache_clear()
    evaluator._exemplars.cache_clear()
    settings = Evaluation(max_input_length=4096)
    with (
        mock.patch.object(Sampler, "stream", answer),
        mock.patch.object(seqio.Task, "get_dataset", get_dataset),
    ):
        evaluations = []
        for name in ("rte_4shot", "web_questions_4shot"):
            judge = evaluator.Evaluator(Sampler(base, settings, Partitioner()), task=name, icl="")
            evaluations.append(judge.target({"model": {}}, "test", 12))
    return [evaluation.entry for evaluation in evaluations], [evaluation.rows for evaluation in evaluations]


def test_the_pool_of_exemplars_does_not_depend_on_shards(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a split of more rows than the pool: the first ones in the order that TFDS stores them in, shuffled once."""
    monkeypatch.setattr(text, "POOL_ROWS", 60)
    pools = []
    for shards in (1, 3, 8):
        rows = [paper_rows.varied(row, i) for i in range(60) for row, _, _ in CASES["rte"][2]]
        paper_rows.prepare(CASES["rte"][0], {"train": rows, "validation": rows}, tmp_path / str(shards), shards)
        text.get("rte").source.tfds_dataset.override_data_dir(str(tmp_path / str(shards)))
        pools.append([e.id for e in text.pool("rte")])
    text.get("rte").source.tfds_dataset.override_data_dir(str(data))
    assert len(list((tmp_path / "8").rglob("super_glue-train.tfrecord*"))) == 8
    assert pools[0] == pools[1] == pools[2] and len(set(pools[0])) == 60 < 0.9 * len(rows)


def test_shuffling_and_sharding_change_no_score(tmp_path: Path, data: Path) -> None:
    for shards in (1, 4):
        for task, splits in (("rte", ("train", "validation", "test")), ("web_questions", ("train", "test"))):
            rows = [paper_rows.varied(row, i) for i in range(20) for row, _, _ in CASES[task][2]]
            paper_rows.prepare(CASES[task][0], dict.fromkeys(splits, rows), tmp_path / str(shards), shards)
    results = []
    for folder in (tmp_path / "1", tmp_path / "4"):
        for task in ("rte", "web_questions"):
            text.get(task).source.tfds_dataset.override_data_dir(str(folder))
        results += [scored(shuffle=False), scored(shuffle=True)]
    for task in ("rte", "web_questions"):
        text.get(task).source.tfds_dataset.override_data_dir(str(data))

    assert len(list((tmp_path / "4").rglob("super_glue-train.tfrecord*"))) == 4
    assert all(result == results[0] for result in results)
    scores, rows = results[0]
    assert 0 < scores[0].score < 100 and [row.shots for row in rows[1]] == [4] * 12


@pytest.mark.parametrize("name", FINETUNE)
def test_training_with_one_exemplar_in_front(name: str) -> None:
    pool = {f"{e.inputs} {e.targets}": e for e in text.read(name, "train")}
    stream = WithExemplars(text.stream(f"{name}_1shot", "train", seed=0), 0, len, 10_000)

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
    stream = WithExemplars(text.stream("rte_enfr_1shot", "train", seed=0), 0, len, 10_000)

    examples = list(itertools.islice(stream, 60))

    assert {e.task for e in examples} == {"rte_1shot", "wmt14_enfr_1shot"}
    for example in examples:
        exemplar, query = example.inputs.split("\n\n")
        assert ("Translate" in exemplar) == ("Translate" in query) == (example.task == "wmt14_enfr_1shot")


def test_only_articles_are_shortened() -> None:
    for name in CASES:
        (example, *_) = text.read(name, "test")
        if name in ("xsum", "wiki_lingua"):
            composed, dropped = compose(example, [example], lambda s: len(s.split()), 6)
            assert composed == " ".join(example.inputs.split(" ")[:3]) + " One sentence summary:"
            assert dropped == 1
        else:
            with pytest.raises(UserError, match="over the limit of 2: allow longer inputs"):
                compose(example, [], lambda s: len(s.split()), 2)


def test_documented() -> None:
    """The table names what is registered, and every command trains on a registered task with settings that bind."""
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text("utf-8")

    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    assert {row[0]: row[1] for row in rows if row[0] != "rte_enfr"} == {name: case[0] for name, case in CASES.items()}
    paper_options = re.search('PAPER="(.*?)"', page)[1]  # type: ignore[index]
    commands = re.findall(r"python -m promot_jax\.main ((?:.*\\\n)*.*)", page)
    for command in commands:
        options = shlex.split(command.replace("\\\n", " ").replace("$PAPER", paper_options))
        files = [option.removeprefix("--gin_file=") for option in options if option.startswith("--gin_file=")]
        paths = [gin_files.folder() / name for name in files]
        given = [option.removeprefix("--gin.").split("=", 1) for option in options if option.startswith("--gin.")]
        arguments = binding.bind(main.CONFIGURABLES, paths, given).keywords
        experiment = arguments["experiment"]
        assert experiment.modules == paper.__name__ and experiment.checkpoint == "MODEL"
        for task in [*(arguments.get("tasks") or [experiment.task]), experiment.icl_mixture]:
            assert text.get(task).splits
    assert len(commands) == 7


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
