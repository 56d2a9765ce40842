import collections
import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from promot_jax.data import examples as text
from promot_jax.data import validation
from promot_jax.errors import UserError
from promot_jax.tasks import metrics, register, templates

# Run as a module of a user's own, here and in a process of its own.
MODULE = """
from promot_jax.tasks import metrics, register, templates

def rows(split):
    return [{"id": f"{split}-{i}", "country": f"C{i}", "capital": f"K{i}"} for i in range(40)]

template = templates.labelled("Country", "Capital", "country", "capital")
register.register("text_one", rows, template, [metrics.exact_match])
apart = lambda split: [{**row, "country": row["id"]} for row in rows(split)]
register.register("text_trained", apart, template, [metrics.exact_match])
register.register("text_other", apart, template, [metrics.exact_match])
register.register("text_two", rows, template, [metrics.exact_match], labels=["K0", "K1"], splits=["train", "test"])
register.register_mixture("text_mixture", {"text_two": 1, "text_one": 3})
"""
BYTES = seqio.ByteVocabulary()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Registers the tasks; the folder of the user's module."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks_of_a_user.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        text.import_tasks(["tasks_of_a_user"])
        tokenized("text_bytes", seqio.preprocessors.tokenize)
        tokenized("text_ids", tokenize_only)
        seqio.MixtureRegistry.add("text_tokens", [("text_bytes", 1), ("text_ids", 4)])
        yield folder


def tokenize_only(data: tf.data.Dataset) -> tf.data.Dataset:
    return data.map(lambda e: {name: BYTES.encode_tf(value) for name, value in e.items()})


def tokenized(name: str, tokenize: object) -> None:
    """Registers a task as SeqIO's users do: token ids with an end-of-sequence token, no other feature."""

    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        inputs = [f"{split} question {i} é" for i in range(30)]
        return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": [f"answer {i}" for i in range(30)]})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["train", "test"]),
        preprocessors=[tokenize, seqio.preprocessors.append_eos],
        output_features={n: seqio.Feature(BYTES, add_eos=True) for n in ("inputs", "targets")},
        metric_fns=[metrics.exact_match],
    )


def take(name: str, n: int, seed: int = 0) -> list[text.Example]:
    return list(itertools.islice(text.stream(name, "train", seed=seed), n))


def test_read_returns_all_features() -> None:
    example = next(e for e in text.read("text_two", "test") if e.id == "test-3")

    assert example == text.Example("text_two", "test-3", "Country: C3\nCapital:", "K3", ("K0", "K1"), "Country:", 0)


def test_the_order_does_not_depend_on_how_rows_are_stored() -> None:
    rows = [{"id": f"test-{i}", "country": f"C{i}", "capital": f"K{i}"} for i in range(40)]
    np.random.default_rng(0).shuffle(rows)  # type: ignore[arg-type]
    template = templates.labelled("Country", "Capital", "country", "capital")
    register.register("text_shuffled", lambda _: rows, template, [metrics.exact_match])

    assert [e.id for e in text.read("text_shuffled", "test")] == [e.id for e in text.read("text_one", "test")]


def test_a_limit_takes_a_subset_that_a_larger_one_has_too() -> None:
    few, more = ([e.id for e in text.read("text_one", "test", limit=limit)] for limit in (9, 20))

    assert len(few) == 9
    assert more[:9] == few
    assert few != [f"test-{i}" for i in range(9)]  # not the first ones stored
    assert text.read("text_one", "test", limit=1000) == text.read("text_one", "test")


def test_of_a_large_split_the_first_rows_are_read() -> None:
    stored = [f"train-{i}" for i in range(40)]

    assert {e.id for e in text.read("text_one", "train", within=12)} == set(stored[:12])
    assert len(text.read("text_one", "train", within=12, limit=5)) == 5
    assert text.read("text_one", "train", within=40) == text.read("text_one", "train")


def test_the_first_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks, the lengths and the losses before a run's first update are all of these."""
    reads: list[str] = []
    elements = text._elements

    def counted(task: seqio.Task, split: str, **options: Any) -> Any:
        reads.append(f"{task.name} {split}")
        return elements(task, split, **options)

    monkeypatch.setattr(text, "_elements", counted)
    text._first_rows.cache_clear()
    for task in ("text_trained", "text_other"):  # the rows of a task that is not trained on are not kept
        validation.check([task], ["text_trained"], ["test"])
    first = text.first_rows(text.get("text_trained"), "train")
    assert [e.id for e in first] == [f"train-{i}" for i in range(40)]
    assert reads == [f"{task} {split}" for task in ("text_trained", "text_other") for split in ("train", "test")]
    assert text.ordered(first) == text.read("text_trained", "train")


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_any_number_of_shots(k: int) -> None:
    assert {e.shots for e in text.read(f"text_one_{k}shot", "test")} == {k}
    assert text.read(f"text_one_{k}shot", "test")[0].task == f"text_one_{k}shot"


def test_a_mixture_with_any_number_of_shots_keeps_its_rates() -> None:
    mixture = text.get("text_mixture_3shot")

    assert text.task_names("text_mixture_3shot") == ["text_two_3shot", "text_one_3shot"]
    assert mixture.rate_per_task_name == {"text_two_3shot": 1.0, "text_one_3shot": 3.0}
    assert text.get("text_mixture_3shot") is mixture


def test_task_names_of_nested_mixtures() -> None:
    register.register_mixture("text_nested", ["text_one", "text_mixture"])

    assert text.task_names("text_nested") == ["text_one", "text_two"]
    assert text.task_names("text_one") == ["text_one"]


def test_base_task() -> None:
    assert text.base_task("text_one_12shot") == "text_one"
    assert text.base_task("text_mixture_1shot") == "text_mixture"
    assert text.base_task("text_one") == "text_one"
    assert text.base_task("somebodys_3shot") == "somebodys_3shot"


@pytest.mark.parametrize("name", ["text_onee", "text_onee_4shot"])
def test_an_unknown_name_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=rf"no task or mixture is called '{name}' \(did you mean 'text_one"):
        text.get(name)


def test_a_missing_split_names_those_there_are() -> None:
    with pytest.raises(UserError, match="'text_two' has no split 'validation': it has train, test"):
        text.read("text_two", "validation")
    with pytest.raises(UserError, match="'text_two' has no split 'validation': it has train, test"):
        text.stream("text_mixture", "validation", seed=0)


def test_a_mixture_is_not_read_as_one_task() -> None:
    with pytest.raises(UserError, match=r"'text_mixture' is a mixture.*text_two, text_one"):
        text.read("text_mixture", "test")


def test_a_module_that_cannot_be_imported(folder: Path) -> None:
    (folder / "broken_tasks.py").write_text("import no_such_package")

    with pytest.raises(UserError, match="'no_tasks_here' fails"):
        text.import_tasks(["no_tasks_here"])
    with pytest.raises(UserError, match=r"'broken_tasks' fails .*no_such_package"):
        text.import_tasks(["broken_tasks"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero, failing_tasks.py line 2"),
        ("undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("def rows(:", "SyntaxError"),
        ("open('/no/such/file')", "FileNotFoundError"),
    ],
)
def test_a_module_that_fails(folder: Path, source: str, says: str) -> None:
    (folder / "failing_tasks.py").write_text(source)
    importlib.invalidate_caches()

    with pytest.raises(UserError, match=rf"'failing_tasks' fails \({says}"):
        text.import_tasks(["failing_tasks"])


def seqio_task(name: str, source: object) -> None:
    features = {
        key: seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.string, rank=0)
        for key in ("inputs", "targets")
    }
    data = seqio.FunctionDataSource(source, splits=["train"])
    seqio.TaskRegistry.add(name, source=data, preprocessors=[], output_features=features, metric_fns=[])


def test_bytes_of_another_encoding_in_a_seqio_task() -> None:
    """`bytes.decode` says where text is no UTF-8."""

    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices({"inputs": ["café".encode("latin-1")], "targets": ["x"]})

    seqio_task("text_latin", source)

    with pytest.raises(UserError, match=r"split 'train' of task 'text_latin' .* no UTF-8: byte 0xe9 in b'caf"):
        text.read("text_latin", "train")


def test_a_seqio_source_that_fails() -> None:
    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        raise LookupError(f"nothing for {split}")

    seqio_task("text_failing", source)

    with pytest.raises(UserError, match=r"split 'train' of task 'text_failing' cannot be read \(LookupError: nothing"):
        text.read("text_failing", "train")


def test_a_seqio_mixture_with_a_rate_of_nothing() -> None:
    """NumPy's own sampler refuses such probabilities, with a traceback."""
    seqio.MixtureRegistry.add("text_rates", [("text_one", 1.0), ("text_two", float("nan"))])

    with pytest.raises(UserError, match="'text_rates' mixes task 'text_two' at rate nan"):
        text.stream("text_rates", "train", seed=0)


@pytest.mark.parametrize("name", ["text_one", "text_mixture_4shot", "text_tokens"])
def test_a_stream_repeats_itself(name: str) -> None:
    assert take(name, 100) == take(name, 100)
    assert take(name, 100) != take(name, 100, seed=1)


def test_a_stream_is_the_same_in_another_process(folder: Path) -> None:
    script = (
        "import itertools, json\n"
        "from promot_jax.data import examples as text\n"
        "text.import_tasks(['tasks_of_a_user'])\n"
        "stream = text.stream('text_mixture_4shot', 'train', seed=5)\n"
        "print(json.dumps([[e.task, e.id] for e in itertools.islice(stream, 60)]))\n"
    )
    path = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", "PATH": ""}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=path).stdout

    assert json.loads(out) == [[e.task, e.id] for e in take("text_mixture_4shot", 60, seed=5)]


def test_a_stream_covers_the_split_and_keeps_the_rates() -> None:
    taken = take("text_mixture", 800)

    assert {e.id for e in taken} == {f"train-{i}" for i in range(40)}
    assert collections.Counter(e.task for e in taken)["text_one"] == pytest.approx(600, abs=50)


@pytest.mark.parametrize("name", ["text_one", "text_mixture", "text_tokens"])
def test_shards_share_the_examples_out(folder: Path, name: str) -> None:
    """Each has its own, together they have all, and one shard is the whole stream."""

    def shard(index: int, of: int, n: int) -> list[text.Example]:
        return list(itertools.islice(text.stream(name, "train", seed=3, shard=index, shards=of), n))

    assert shard(0, 1, 40) == take(name, 40, seed=3)
    whole = {(e.task, e.id) for task in text.task_names(name) for e in text.read(task, "train")}
    parts = [shard(index, 3, 8 * len(whole)) for index in range(3)]
    assert shard(1, 3, 30) == parts[1][:30]
    found = [{(e.task, e.id) for e in part} for part in parts]
    assert set.union(*found) == whole and sum(map(len, found)) == len(whole)
    if name == "text_mixture":  # at its rates, drawn for each shard anew
        drawn = [[e.task for e in part] for part in parts]
        assert drawn[0] != drawn[1]
        assert all(0.65 < tasks.count("text_one") / len(tasks) < 0.85 for tasks in drawn)


def test_an_empty_shard_ends_with_a_sentence() -> None:
    stream = text.stream("text_one", "train", seed=0, shard=99, shards=100)
    with pytest.raises(UserError, match="'text_one' has no examples; shard 99 of 100 is empty: lower DATA_SHARDS"):
        next(stream)


def test_an_empty_split_ends_with_a_sentence() -> None:
    register.register("text_empty", lambda _: [], templates.Template("x", "y"), [metrics.accuracy])

    with pytest.raises(UserError, match="Task 'text_empty' has no row in its split 'train'"):
        take("text_empty", 1)


@pytest.mark.parametrize("name", ["text_bytes", "text_ids"])
def test_a_tokenized_task_is_read_as_text(name: str) -> None:
    examples = text.read(name, "test")

    example = next(e for e in examples if e.targets == "answer 7")
    assert example.inputs == "test question 7 é"
    assert (example.labels, example.prefix, example.shots) == ((), "", 0)
    assert example.id == text.stable_hash("test question 7 é", "answer 7")
    assert len({e.id for e in examples}) == 30


def test_a_mixture_of_tokenized_tasks_keeps_its_rates() -> None:
    taken = take("text_tokens", 500)

    assert collections.Counter(e.task for e in taken)["text_ids"] == pytest.approx(400, abs=40)
    assert all(e.inputs.startswith("train question") for e in taken)


def test_a_tokenized_task_with_shots() -> None:
    assert {e.shots for e in text.read("text_bytes_2shot", "test")} == {2}
    assert text.read("text_bytes_2shot", "test")[0].inputs == text.read("text_bytes", "test")[0].inputs


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1.0, 2.0]], "'targets' as float32 of shape"),
        ([["a", "b"]], "'targets' as object of shape"),
        (None, "only inputs"),
    ],
)
def test_features_that_are_no_text(targets: object, message: str, request: pytest.FixtureRequest) -> None:
    name = f"text_odd_{abs(hash(request.node.name))}"
    columns = {"inputs": ["x"]} | ({} if targets is None else {"targets": targets})
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns), splits=["test"]
        ),
        output_features={},
        preprocessors=[],
    )

    with pytest.raises(UserError, match=message):
        text.read(name, "test")
