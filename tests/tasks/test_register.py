import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import seqio
import tensorflow as tf

from promot_jax.data.examples import FEATURES, stable_hash
from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError
from promot_jax.tasks import metrics, postprocess, register, templates

pytestmark = pytest.mark.usefixtures("registry")
CAPITAL = templates.labelled("Country", "Capital", "country", "capital")
SIZES = {"train": 20, "validation": 5, "test": 7}


def rows(split: str) -> list[register.Row]:
    return [{"id": f"{split}-{i}", "country": f"C{i}", "capital": f"K{i}"} for i in range(SIZES[split])]


def elements(name: str, split: str = "test", **options: object) -> list[dict[str, object]]:
    data = seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split=split, shuffle=False, **options)
    return list(data.as_numpy_iterator())


def test_every_feature_is_there() -> None:
    register.register("kind", rows, CAPITAL, [metrics.accuracy], labels=["K0", "K1"])

    element = elements("kind_4shot")[3]

    assert sorted(element) == sorted(FEATURES)
    assert element["inputs"] == b"Country: C3\nCapital:"
    assert element["targets"] == b"K3"
    assert element["id"] == b"test-3"
    assert list(element["labels"]) == [b"K0", b"K1"]  # type: ignore[call-overload]
    assert element["prefix"] == b"Country:"
    assert element["shots"] == 4
    assert elements("kind")[3]["shots"] == 0


def test_nothing_is_read_before_it_is_needed() -> None:
    def unreachable(split: str) -> Sequence[register.Row]:
        raise AssertionError(split)

    register.register("lazy", unreachable, CAPITAL, [metrics.accuracy])
    register.register_mixture("lazy_mixture", ["lazy"])

    assert seqio.get_mixture_or_task("lazy_mixture_4shot").splits


def test_one_shot_and_four_shot_variants_are_plain_seqio_names() -> None:
    register.register("plain", rows, CAPITAL, [metrics.accuracy])
    register.register_mixture("plain_mixture", ["plain"])

    suffixes = ("", "_0shot", "_1shot", "_4shot")
    assert {f"plain{suffix}" for suffix in suffixes} <= set(seqio.TaskRegistry.names())
    assert {f"plain_mixture{suffix}" for suffix in suffixes} <= set(seqio.MixtureRegistry.names())


def test_a_mixture_of_different_label_sets_and_rates() -> None:
    register.register("open_one", rows, CAPITAL, [metrics.accuracy])
    register.register("closed_one", rows, CAPITAL, [metrics.accuracy], labels=["K0", "K1", "K2"])
    mixture = register.register_mixture("both", {"open_one": 3, "closed_one": 1})

    assert [mixture.get_rate(task) for task in mixture.tasks] == [1.0, 3.0]  # SeqIO sorts: closed_one, open_one
    got = elements("both_1shot", "train", num_epochs=1)
    assert {len(element["labels"]) for element in got} == {0, 3}  # type: ignore[arg-type]


def test_seqios_own_entry_point_reads_a_mixture() -> None:
    register.register("entry", rows, CAPITAL, [metrics.accuracy])
    register.register_mixture("entry_mixture", ["entry"])

    data = seqio.get_dataset(
        "entry_mixture_4shot",
        {"inputs": None, "targets": None},
        seqio.PassThroughFeatureConverter(),
        dataset_split="test",
        shuffle=True,
        seed=1,
    )

    assert sorted(element["id"] for element in data.as_numpy_iterator()) == [f"test-{i}".encode() for i in range(7)]


def test_shards_deal_the_examples_out() -> None:
    register.register("sharded", rows, CAPITAL, [metrics.accuracy])

    parts = [elements("sharded", shard_info=seqio.ShardInfo(index=i, num_shards=3)) for i in range(3)]

    assert [len(part) for part in parts] == [3, 2, 2]
    assert {element["id"] for part in parts for element in part} == {f"test-{i}".encode() for i in range(7)}


def test_rates_by_size_count_the_rows() -> None:
    task = register.register("sized", rows, CAPITAL, [metrics.accuracy])

    assert task.num_input_examples("train") == 20


@pytest.fixture
def cache_folder(tmp_path: Path) -> Iterator[Path]:
    before = seqio.get_global_cache_dirs()
    seqio.set_global_cache_dirs([str(tmp_path)])
    yield tmp_path
    seqio.set_global_cache_dirs(before)


def test_a_cached_task_is_read_from_its_cache(cache_folder: Path) -> None:
    """The folder is written as `seqio_cache_tasks` does, which itself needs apache-beam."""
    task = register.register("cached", rows, CAPITAL, [metrics.accuracy], labels=["K0", "K1"])
    assert task.supports_caching
    folder = cache_folder / "cached"
    folder.mkdir()
    example = tf.train.Example()
    features = {}
    for name, feature in FEATURES.items():
        features[name] = {"dtype": feature.dtype.name, "shape": [None] * feature.rank}
        values = example.features.feature[name]
        if name == "shots":
            values.int64_list.value.append(0)
        else:
            values.bytes_list.value.extend([b"K0", b"K1"] if feature.rank else [f"cached {name}".encode()])
    with tf.io.TFRecordWriter(str(folder / "test.tfrecord-00000-of-00001")) as writer:
        writer.write(example.SerializeToString())
    info = {"num_shards": 1, "features": features, "seqio_version": "0.0.20"}
    (folder / "info.test.json").write_text(json.dumps(info))
    (folder / "stats.test.json").write_text(json.dumps({"examples": 1}))
    (folder / "COMPLETED").touch()

    (element,) = elements("cached", use_cached=True)

    assert element["inputs"] == b"cached inputs"
    assert list(element["labels"]) == [b"K0", b"K1"]  # type: ignore[call-overload]
    assert element["shots"] == 0


def test_rows_without_an_id_get_a_stable_one() -> None:
    register.register("nameless", lambda _: [{"country": "C", "capital": "K"}], CAPITAL, [metrics.accuracy])

    assert elements("nameless")[0]["id"] == stable_hash("C", "K").encode()


def test_an_empty_split_is_said_to_be_empty() -> None:
    register.register("empty", lambda _: [], CAPITAL, [metrics.accuracy])

    with pytest.raises(UserError, match="Task 'empty' has no row in its split 'test'"):
        elements("empty")


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "often", True])
def test_a_mixing_rate_that_is_no_positive_number(rate: float) -> None:
    """SeqIO's own sampler takes probabilities: positive, with a finite sum."""
    register.register("mixed", rows, CAPITAL, [metrics.accuracy])

    with pytest.raises(UserError, match=f"mixture 'rated' mixes task 'mixed' at rate {rate!r}: rates are positive"):
        register.register_mixture("rated", {"mixed": rate})


@pytest.mark.parametrize("tasks", [[], {}, "mixed"])
def test_a_mixture_of_no_list(tasks: list[str]) -> None:
    with pytest.raises(UserError, match="mixture 'rated' needs a list of tasks"):
        register.register_mixture("rated", tasks)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "my task"}, "cannot be called 'my task'"),
        ({"rows": {"train": []}}, "rows of task 'wrong' are a dict: give a function"),
        ({"template": "{country}"}, "template of task 'wrong' is a str"),
        ({"template": templates.Template("{country", "x")}, "is no format string"),
        ({"template": templates.Template("{}", "x")}, "has a field without a name"),
        ({"metric_fns": metrics.accuracy}, "metric_fns of task 'wrong' is MeanMetric"),
        ({"metric_fns": ["accuracy"]}, "give a list of functions"),
        ({"labels": "True"}, "labels of task 'wrong' is 'True': give a list"),
        ({"labels": [1, 2]}, "give a list of texts"),
        ({"splits": "train"}, "splits of task 'wrong' is 'train': give a list"),
        # What `str.encode` refuses.
        (
            {"labels": ["good", "bad\ud83d"]},
            r"a label of task 'wrong', 'bad\\ud83d', has half a character, \\ud83d at 3",
        ),
        ({"splits": ["train", "\udc00"]}, "a split of task 'wrong', .* has half a character"),
        ({"template": templates.Template("\ud83d: {country}", "x")}, "the template's inputs of task 'wrong', .* at 0"),
        ({"template": templates.Template("{country}", "x\ud83d")}, "the template's targets of task 'wrong'"),
        ({"template": templates.Template("{country}", "x", "\ud83d")}, "the template's prefix of task 'wrong'"),
        ({"template": templates.Template("{country}", "x", "", "\ud83d")}, "the template's suffix of task 'wrong'"),
    ],
)
def test_arguments_of_the_wrong_kind(wrong: dict[str, object], says: str) -> None:
    right = {"name": "wrong", "rows": rows, "template": CAPITAL, "metric_fns": [metrics.accuracy]}

    with pytest.raises(UserError, match=says):
        register.register(**right | wrong)


def test_postprocessing_follows_from_the_labels() -> None:
    closed = register.register("closed", rows, CAPITAL, [metrics.accuracy], labels=["K0"])
    opened = register.register("opened", rows, CAPITAL, [metrics.exact_match])
    custom = register.register(
        "own", rows, CAPITAL, [metrics.exact_match], postprocess_fn=lambda output, **_: output[::-1]
    )

    assert closed.postprocess_fn(" k0, I think\n", example={}, is_target=False) == "K0"
    assert opened.postprocess_fn(" k0, I think\n", example={}, is_target=False) == "k0, I think"
    assert custom.postprocess_fn("abc", example={}, is_target=False) == "cba"
    assert seqio.get_mixture_or_task("closed_4shot").postprocess_fn("K0 x", example={}, is_target=False) == "K0"
    assert [fn({"a"}, {"a"}) for fn in closed.metric_fns] == [{"accuracy": 100.0}]
    assert postprocess.STOP == Decoding().stop == "\n"


def test_a_name_is_registered_once() -> None:
    register.register("twice", rows, CAPITAL, [metrics.accuracy])

    with pytest.raises(UserError, match="'twice' is registered already"):
        register.register("twice", rows, CAPITAL, [metrics.accuracy])
    with pytest.raises(UserError, match="'twice' is registered already"):
        register.register_mixture("twice", ["twice"])


def test_a_field_the_rows_lack() -> None:
    register.register("typo", rows, templates.Template("{contry}", "{capital}"), [metrics.accuracy])

    with pytest.raises(UserError, match=r"'typo' names a field 'contry' \(did you mean 'country'\?\)"):
        elements("typo")


def test_a_mixture_of_an_unknown_task() -> None:
    register.register("known_one", rows, CAPITAL, [metrics.accuracy])

    with pytest.raises(UserError, match="did you mean 'known_one'"):
        register.register_mixture("wrong", ["knwon_one"])
