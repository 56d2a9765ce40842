"""SeqIO caches: a cached task gives the examples of the task itself; a broken cache gives one error message."""

import ast
import collections
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_tasks

from promot_jax.data import caches
from promot_jax.data import examples as text
from promot_jax.data.exemplars import choose
from promot_jax.errors import UserError
from promot_jax.experiments import resume_guard, session
from promot_jax.experiments.session import open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.tasks import register

ROOT = Path(__file__).parents[2]
TASKS = ["tiny_review", "tiny_colour", "cache_answers"]
FILES = 3  # per split
ANSWERS = ["one", "two", "three"]


def element(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {"question": row["noun"], "answer": row["label"], "answers": tf.constant(ANSWERS)}


def write(folder: Path, name: str) -> None:
    """Writes a task's cache as `seqio_cache_tasks` does: its examples in any order, dealt out to files."""
    task = seqio.TaskRegistry.get(name)
    place = folder / name
    place.mkdir(parents=True)
    for split in task.splits:
        data = task.preprocess_precache(task.source.get_dataset(split, shuffle=False))
        examples = list(data)
        np.random.default_rng(0).shuffle(examples)  # type: ignore[arg-type]
        for i in range(FILES):
            with tf.io.TFRecordWriter(str(place / f"{split}.tfrecord-{i:05d}-of-{FILES:05d}")) as file:
                for example in examples[i::FILES]:
                    file.write(seqio.dict_to_tfexample(example).SerializeToString())
        features = {k: {"shape": [None] * v.shape.rank, "dtype": v.dtype.name} for k, v in data.element_spec.items()}
        info = {"features": features, "num_shards": FILES, "seqio_version": seqio.__version__}
        (place / f"info.{split}.json").write_text(json.dumps(info))
        (place / f"stats.{split}.json").write_text(json.dumps({"examples": len(examples)}))
    (place / "COMPLETED").write_text("tfrecord")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of all tasks. Registers one with several right answers, and one that is read from a cache only."""
    register.register(
        "cache_answers",
        tiny_tasks.reviews,
        register.Template("Q: {question} A:", "{answer}"),
        [lambda targets, predictions: {"exact_match": 0.0}],
        preprocessors=[lambda data: data.map(element)],
    )
    for name, required in {"cache_plain": False, "cache_required": True}.items():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": ["a", "b"]}),
                splits=["train"],
            ),
            preprocessors=[seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(required=required)],
            output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
        )
    folder = tmp_path_factory.mktemp("built")
    for name in [*TASKS, "cache_plain"]:
        write(folder, name)
    return folder


def use_caches(folders: list[str], names: list[str]) -> None:
    caches.use(folders, [text.get(name) for name in names])


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`cache("task", ...)` has a cache used and returns its folder; sources may no longer be read. Undone later."""

    def use(*names: str) -> str:
        for name in names:
            shutil.copytree(built / name, tmp_path / "cache" / name)
            source = seqio.TaskRegistry.get(name).source
            monkeypatch.setattr(source, "get_dataset", lambda **_: pytest.fail("the source was read"))
        use_caches([str(tmp_path / "cache")], [*TASKS, *names])
        return str(tmp_path / "cache")

    yield use
    seqio.set_global_cache_dirs([])
    for task in map(seqio.TaskRegistry.get, seqio.TaskRegistry.names()):
        task._cache_dir = None  # SeqIO remembers


def take(name: str, n: int, seed: int = 0) -> list[text.Example]:
    return list(itertools.islice(text.stream(name, "train", seed=seed), n))


@pytest.mark.parametrize("name", TASKS)
def test_same_examples_in_the_same_order(name: str, cache: Callable[..., str]) -> None:
    sources = [text.read(name, split) for split in register.SPLITS]
    cache(name)
    cached = [text.read(name, split) for split in register.SPLITS]

    assert cached == sources and [len(examples) for examples in cached] == [24, 6, 10]
    assert [e.features.keys() for e in cached[1]] == [e.features.keys() for e in sources[1]]
    assert {e.answers for e in cached[1]} == {tuple(ANSWERS) if name == "cache_answers" else ()}
    assert text.read(name, "test", limit=3, within=10) == cached[2][:3]


def test_shots_are_read_from_the_cache_of_the_task(cache: Callable[..., str]) -> None:
    name = "tiny_review_5shot"
    source = text.read(name, "train")
    assert text.cached([name]) == []
    cache("tiny_review")

    assert text.read(name, "train") == source
    assert {e.shots for e in source} == {5}
    assert text.cached([name, "tiny_review", "tiny_colour"]) == [name, "tiny_review"]
    assert take(name, 50) == [dataclasses.replace(e, task=name, shots=5) for e in take("tiny_review", 50)]


def test_exemplars_are_the_same(cache: Callable[..., str], built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a split of more rows than the pool too: a cache's first rows are other ones."""

    def chosen() -> list[list[text.Example]]:
        pool = text.pool("pool")
        return [choose("pool", 0, e.id, pool, 3) for e in text.read("pool", "test")]

    monkeypatch.setattr(text, "POOL_ROWS", 10)
    register.register("pool", tiny_tasks.reviews, register.Template("Q: {noun} A:", "{label}"), [])
    before = chosen()
    write(built, "pool")
    cache("pool")

    first = {e.id for e in text.read("pool", "train", within=10)}
    assert text.cached(["pool"]) and first != {e.id for e in text.pool("pool")}
    assert chosen() == before and len(text.pool("pool")) == 10


def test_a_cached_task_without_a_split_for_exemplars(
    cache: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache("cache_plain")
    assert {e.targets for e in text.pool("cache_plain")} == {"a", "b"}
    monkeypatch.setattr(text, "POOL_ROWS", 1)
    with pytest.raises(
        UserError, match=r"which of its 2 training rows exemplars .* a split 'exemplars' \('train\[:1\]'"
    ):
        text.pool("cache_plain")


def test_a_stream_of_the_cache_covers_the_split_and_repeats_itself(cache: Callable[..., str]) -> None:
    source = take("tiny_review", 100)
    cache("tiny_review")
    taken = take("tiny_review", 100)

    assert {e.id for e in taken} == {e.id for e in source} and len({e.id for e in taken}) == 24
    assert take("tiny_review", 100) == taken != take("tiny_review", 100, seed=1)
    mixed = collections.Counter(e.task for e in take("tiny_pair", 300))  # the other half from its source
    assert mixed["tiny_review"] == pytest.approx(200, abs=30)


def test_seqios_own_entry_point_reads_the_cache(cache: Callable[..., str]) -> None:
    cache("tiny_review")
    lengths = {"inputs": None, "targets": None}
    data = seqio.get_dataset(
        "tiny_review_1shot", lengths, seqio.PassThroughFeatureConverter(), dataset_split="test", use_cached=True
    )

    assert {e["shots"] for e in itertools.islice(data.as_numpy_iterator(), 10)} == {1}


def test_without_folders_the_sources_are_read_again(cache: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = text.read("tiny_review", "test")
    folder = cache("tiny_review")
    monkeypatch.undo()
    assert text.cached(TASKS) == ["tiny_review"]

    use_caches([], TASKS)
    shutil.rmtree(folder)

    assert text.cached(TASKS) == [] and text.read("tiny_review", "test") == source


def test_a_folder_without_a_finished_cache(cache: Callable[..., str], built: Path) -> None:
    with pytest.raises(UserError, match=r"SEQIO_CACHE_DIRS names .*/cache, where no task of this run .*tiny_review"):
        cache()
    folder = Path(cache("tiny_colour"))
    with pytest.raises(UserError, match="names /nowhere, where"):
        use_caches([str(folder), "/nowhere"], TASKS)
    shutil.copytree(built / "tiny_review", folder / "tiny_review")
    (folder / "tiny_review" / "COMPLETED").unlink()  # killed while it was built
    use_caches([str(folder)], TASKS)
    assert text.cached(TASKS) == ["tiny_colour"]


def test_a_folder_with_the_cache_of_a_task_that_comes_later(
    cache: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that goes through several experiments may have a cache for some of them only."""
    folder = cache("tiny_review")
    lengths = {"inputs": 8, "targets": 8}
    first, later = (
        Experiment(folder, task, "tiny_tasks", lengths, "", cache_dirs=folder) for task in ("tiny_size", "tiny_review")
    )

    class LoadsError(Exception):
        """The names were accepted."""

    def load_base(experiment: Experiment) -> None:
        raise LoadsError

    monkeypatch.setattr(session, "load_base", load_base)
    with pytest.raises(UserError, match="no task of this run"):
        open_session(first)
    with pytest.raises(LoadsError):
        open_session(first, [first, later])


def test_a_task_that_asks_for_its_cache(cache: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"'cache_required' is read from a cache only: .*SEQIO_CACHE_DIRS"):
        text.read("cache_required", "train")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "test.tfrecord-00001-of-00003").unlink(), "2 of 3 files of the split 'test'"),
        (lambda folder: (folder / "info.test.json").unlink(), "No such file"),
        (lambda folder: (folder / "stats.test.json").write_text("{"), "."),
        (lambda folder: cut(folder / "test.tfrecord-00001-of-00003"), "truncated record"),
        (
            lambda folder: (folder / "info.test.json").write_text(
                (folder / "info.test.json").read_text().replace('"prefix"', '"another"')
            ),
            ".",
        ),
    ],
)
@pytest.mark.parametrize("read", ["read", "stream"])
def test_a_damaged_cache(damage: Callable[[Path], None], reason: str, read: str, cache: Callable[..., str]) -> None:
    folder = Path(cache("tiny_review")) / "tiny_review"
    damage(folder)

    with pytest.raises(UserError, match=rf"'tiny_review' in .* is damaged or out of date \(.*{reason}.*\): delete"):
        text.read("tiny_review", "test") if read == "read" else list(
            itertools.islice(text.stream("tiny_review", "test", seed=0), 20)
        )


def test_a_run_goes_on_with_the_same_tasks_cached_only(cache: Callable[..., str], tmp_path: Path) -> None:
    experiment = Experiment("none", "tiny_review", "tiny_tasks", {"inputs": 32, "targets": 3}, "tiny_icl")
    plain = resume_guard.shared_settings(experiment)
    assert not {"cached", "cache_dirs"} & set(plain["experiment"])
    resume_guard.keep_settings(tmp_path, plain)

    folder = cache("tiny_review")
    shared = resume_guard.shared_settings(dataclasses.replace(experiment, cache_dirs=[folder]))

    assert shared["experiment"] == {**plain["experiment"], "cached": ["tiny_review"]}
    with pytest.raises(UserError, match=r"was started with experiment/cached = None, now it is \['tiny_review'\]"):
        resume_guard.keep_settings(tmp_path, shared)


@pytest.mark.slow
def test_beam_builds_the_cache(tmp_path: Path) -> None:
    """With what the extra `cache` names, in an environment of its own, through the launcher; read without Beam."""
    setup = (ROOT / "setup.py").read_text("utf-8")
    wanted = ast.literal_eval(re.search(r"^CACHE = (\[.*\])$", setup, re.M)[1])  # type: ignore[index]
    venv.create(tmp_path / "beam", with_pip=True)
    python = tmp_path / "beam" / "bin" / "python"
    (site,) = (tmp_path / "beam").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{Path(seqio.__file__).parents[1]}\n")  # what is installed here, behind its own
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-input", *wanted], check=True)
    cache = tmp_path / "cache"
    command = [
        f"{ROOT}/launch/cache_tasks.sh",
        "--module=tiny_tasks",
        "--tasks=tiny_(review|size).*",
        f"--cache_dir={cache}",
        "--shards=2",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([*command, f"--python={python}"], env=environment, check=True)

    assert sorted(path.name for path in cache.iterdir()) == [
        "tiny_colour",
        "tiny_review",
        "tiny_size",
    ]  # no k-shot ones
    names = ["tiny_review", "tiny_review_2shot", "tiny_size"]
    sources = {(name, split): text.read(name, split) for name in names for split in register.SPLITS}
    use_caches([str(cache)], names)
    try:
        assert text.cached(names) == names
        assert {key: text.read(*key) for key in sources} == sources
        streamed = take("tiny_pair", 300)
        assert {e.id for e in streamed if e.task == "tiny_review"} == {e.id for e in sources["tiny_review", "train"]}
        assert take("tiny_pair", 300) == streamed
    finally:
        use_caches([], names)
