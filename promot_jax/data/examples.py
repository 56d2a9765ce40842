"""SeqIO tasks and mixtures as text: look them up by name, read them, stream them. `data/encoding.py` makes tokens.

Our own tasks yield the features of `FEATURES`. Other SeqIO tasks work unchanged: `inputs` and `targets` may be text or
token ids (then `*_pretokenized` is read, or the ids are decoded with the task's own vocabulary), and missing features
get defaults.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from promot_jax.data import caches, shots
from promot_jax.data.vocabularies import controls
from promot_jax.errors import RUN_ERRORS, UserError, described, nearest, users_code

# Exemplars come from the first rows of the training split in storage order, so that a split of millions of rows is
# never read whole.
POOL_ROWS = 10_000
EXEMPLARS = "exemplars"  # the split of a source with these rows alone; caches include it
# The features of our own tasks. `shots` is the number of exemplars; they are drawn later (`exemplars`), since how many
# fit depends on the model's tokenizer.
_feature = functools.partial(seqio.Feature, seqio.PassThroughVocabulary(size=0), add_eos=False)
FEATURES: Mapping[str, seqio.Feature] = {
    **{name: _feature(dtype=tf.string, rank=0) for name in ("inputs", "targets", "id", "prefix", "suffix")},
    **{name: _feature(dtype=tf.string, rank=1) for name in ("labels", "answers")},
    "shots": _feature(dtype=tf.int32, rank=0),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a task, as text."""

    task: str  # registered name (so "capital_4shot" in a 4-shot mixture)
    id: str  # unique within the task, independent of the order or sharding of the data
    inputs: str  # the query, template filled in, without exemplars
    targets: str  # the answer; one leading space is the one that separates it from its input
    labels: tuple[str, ...]  # the label set; empty for an open task
    prefix: str  # post-processing cuts an output from the second occurrence of this on; "" cuts nothing
    shots: int  # number of exemplars to prepend
    answers: tuple[str, ...] = ()  # all right answers if there are several; empty if only `targets` is right
    suffix: str = ""  # the end of `inputs` that stays when a too long input is shortened; "" forbids shortening
    # Everything that the task yields, for its post-processor.
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def import_tasks(modules: Sequence[str]) -> None:
    """Imports modules that register tasks; raises UserError naming a module that cannot be imported."""
    for module in modules:
        with users_code(f"Importing task module {module!r}", advice="; look at its name, its path and that line"):
            importlib.import_module(module)


def import_built_in() -> None:
    """Imports the package's own tasks, which a name that no other module registers may be one of."""
    import_tasks(shots.BUILT_IN)


def get(name: str) -> seqio.Task | seqio.Mixture:
    """Returns a task or mixture; registers `<name>_<k>shot` at the first call if `<name>` is known.

    The package's own tasks are always known: they are imported when a name is looked for that nobody else registered.

    Raises UserError, with the nearest name, if there is none.
    """
    if name in (names := _names()):
        return seqio.get_mixture_or_task(name)
    base_name, k = base_and_shots(name)
    if base_name == name and not sys.modules.keys() >= set(shots.BUILT_IN):
        import_built_in()
        return get(name)
    if base_name == name:
        raise UserError(f"no task or mixture is called {name!r}{nearest(name, names)}")
    base, suffix = get(base_name), name.removeprefix(base_name)
    if isinstance(base, seqio.Mixture):
        parts = [(get(part + suffix).name, rate) for part, rate in base.rate_per_task_name.items()]
        return seqio.MixtureRegistry.add(name, parts)
    seqio.TaskRegistry.add_provider(name, _Shots(name, base, k))
    return seqio.TaskRegistry.get(name)


def task_names(name: str) -> list[str]:
    """Returns the names of a mixture's tasks in the order of registration, or the task's own name."""
    provider = get(name)
    if isinstance(provider, seqio.Task):
        return [name]
    return list(dict.fromkeys(task for part in provider.rate_per_task_name for task in task_names(part)))


def base_and_shots(name: str) -> tuple[str, int]:
    """Returns the name without its `_<k>shot` ending, and k; a registered task's own name stays whole, with k = 0."""
    base, k = shots.split(name)
    return (name, 0) if k is None or base not in _names() else (base, k)


def base_task(name: str) -> str:
    """Returns the name without its `_<k>shot` ending, as `base_and_shots`."""
    return base_and_shots(name)[0]


def cached(tasks: Sequence[str]) -> list[str]:
    """Returns the tasks that are read from a cache (`caches.used`)."""
    return [name for name in dict.fromkeys(tasks) if caches.used(get(name))]


def read(name: str, split: str, *, limit: int | None = None, within: int | None = None) -> list[Example]:
    """Returns the examples of one task, in an order that depends on their ids only, not on how the data are stored.

    Args:
      name: a task, not a mixture.
      split: one of the task's splits.
      limit: maximal number; a larger limit returns the same examples and more.
      within: number of rows to read, in storage order; None reads the whole split.

    Raises:
      UserError: `name` is unknown or a mixture, or the task has no such split.
    """
    provider = get(name)
    if isinstance(provider, seqio.Mixture):
        raise UserError(f"{name!r} is a mixture: read its tasks one by one ({', '.join(task_names(name))})")
    _check_split(provider, split)
    return ordered(stored(provider, split, within))[:limit]


def ordered(examples: Iterable[Example]) -> list[Example]:
    """Returns examples in the order of `read`."""
    return sorted(examples, key=lambda e: (stable_hash("0", e.id), e.id, e.inputs))


def stored(task: seqio.Task, split: str, within: int | None = None) -> Iterator[Example]:
    """Yields the examples of a split in storage order; `within` is a number of rows, None for all."""
    for raw in itertools.islice(_elements(task, split, shuffle=False), within):
        yield _example(task, split, raw)


def first_rows(task: seqio.Task, split: str) -> Sequence[Example]:
    """Returns the first `POOL_ROWS` examples of a split, in storage order, and keeps them for the next call.

    For a task that is trained on: its checks, lengths and losses read them, and a row takes half a millisecond.
    """
    return _first_rows(task, split, caches.used(task), POOL_ROWS)


@functools.lru_cache(maxsize=8)
def _first_rows(task: seqio.Task, split: str, from_cache: bool, count: int) -> tuple[Example, ...]:
    return tuple(stored(task, split, count))


def pool(name: str, limit: int | None = None) -> list[Example]:
    """Returns the training examples that exemplars are drawn from: the first `POOL_ROWS` rows of `train`.

    They are the first rows of the source. A cache has no order, so it needs them as the split `EXEMPLARS`, which the
    sources of `tasks.register` have. `limit` is the maximal number of examples.

    Raises:
      UserError: as `read`, or the task is read from a cache that does not show which rows were the first.
    """
    task = get(name)
    if EXEMPLARS in task.splits:
        return read(name, EXEMPLARS, limit=limit)
    if caches.used(task) and (rows := task.get_cached_stats("train")["examples"]) > POOL_ROWS:
        raise UserError(
            f"task {name!r} is read from a cache, and which of its {rows:,} training rows exemplars are drawn from "
            f"would depend on how that was built: give its source a split {EXEMPLARS!r} ('train[:{POOL_ROWS}]' in "
            "TFDS), and build the cache again, or read the task without it"
        )
    return read(name, "train", limit=limit, within=POOL_ROWS)


def stream(name: str, split: str, *, seed: int, shard: int = 0, shards: int = 1) -> Iterator[Example]:
    """Returns an endless shuffled stream of examples of a task, or of a mixture at its rates.

    The n-th example depends on (name, split, seed, shard, shards) only, and on the files of a task's cache.

    Args:
      name: a task or mixture.
      split: one of its splits.
      seed: chooses the order.
      shard: part of the data, 0 to `shards` - 1: whole files if there are enough (SeqIO), else single examples.
      shards: number of parts.

    Raises:
      UserError: `name` is unknown, one of its tasks lacks the split, or the split or shard is empty.
    """
    tasks = [seqio.TaskRegistry.get(task) for task in task_names(name)]
    for task in tasks:
        _check_split(task, split)
    rates = np.array(mixing_rates(name))
    return _mix(tasks, rates / rates.sum(), split, seed, seqio.ShardInfo(shard, shards) if shards > 1 else None)


def mixing_rates(name: str) -> list[float]:
    """Returns the rate of each task of `task_names`; raises UserError for one that is no positive, finite number."""
    provider = get(name)
    if isinstance(provider, seqio.Task):
        return [1.0]
    rates = {task: float(provider.get_rate(seqio.TaskRegistry.get(task))) for task in task_names(name)}
    for task, rate in rates.items():
        if rate or not sum(rates.values()):  # SeqIO's own mixtures may leave a task out by 0
            check_rate(name, task, rate)
    return list(rates.values())


def check_rate(mixture: str, task: str, rate: Any) -> None:
    """Raises UserError for a rate of a task in a mixture that is no positive, finite number."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < float(rate) < math.inf:
        raise UserError(f"mixture {mixture!r} mixes task {task!r} at rate {rate!r}: rates are positive numbers")


def stable_hash(*parts: str) -> str:
    """Returns 16 hexadecimal digits that depend on the strings only, in every process and on every machine."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _mix(
    tasks: Sequence[seqio.Task], rates: np.ndarray, split: str, seed: int, shard: seqio.ShardInfo | None
) -> Iterator[Example]:
    """Yields examples of the tasks' endless data sets, each from a task drawn with `rates` ([tasks], sum 1)."""
    options = {"shuffle": True, "seed": seed, "shard_info": shard, "num_epochs": None}
    streams = [_elements(task, split, **options) for task in tasks]
    draw = np.random.default_rng([seed, shard.index] if shard else seed)
    while True:
        i = int(draw.choice(len(tasks), p=rates))
        raw = next(streams[i], None)
        if raw is None:
            advice = f"; shard {shard.index} of {shard.num_shards} is empty: lower DATA_SHARDS" if shard else ""
            raise UserError(f"split {split!r} of task {tasks[i].name!r} has no examples{advice}")
        yield _example(tasks[i], split, raw)


class _Shots(seqio.Task):
    """A task with `shots` = k in each example, read from the cache of its base task."""

    def __init__(self, name: str, base: seqio.Task, k: int):
        def set_shots(dataset: tf.data.Dataset) -> tf.data.Dataset:
            return dataset.map(lambda example: {**example, "shots": tf.constant(k, tf.int32)})

        self._base = base
        super().__init__(
            name,
            base.source,
            {**base.output_features, "shots": FEATURES["shots"]},
            preprocessors=[*base.preprocessors, set_shots],
            postprocess_fn=base.postprocessor,
            metric_fns=base.metric_fns,
            metric_objs=base.metric_objs,
            shuffle_buffer_size=base.shuffle_buffer_size,
        )

    @property
    def cache_dir(self) -> str | None:
        """The folder of the base task's cache, None without one."""
        return self._base.cache_dir


def _elements(task: seqio.Task, split: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the raw elements of a task, from its cache if it has one. `options` are `get_dataset`'s.

    Raises:
      UserError: the cache is damaged, or the task has changed since.
    """
    from_cache = caches.used(task)
    if task.requires_caching and not from_cache:
        raise UserError(f"task {task.name!r} is read from a cache only: name its folder in SEQIO_CACHE_DIRS")
    # Local names: at exit a stream may outlive the module. What passes may go away by itself, and is no fault of data.
    transient = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    passed, damage = (*RUN_ERRORS, *transient, MemoryError), Exception
    try:
        if from_cache:
            caches.check_files(task.cache_dir, split)
        with contextlib.nullcontext() if options["shuffle"] else in_storage_order():
            # Without lengths there is nothing to trim: a step per row less.
            settings = {"use_cached": from_cache, "try_in_mem_cache": False, "trim_output_features": False}
            dataset = task.get_dataset(None, split, **settings, **options)
        yield from dataset.as_numpy_iterator()
    except passed:
        raise
    except damage as error:  # of any kind: sources and preprocessors are the user's
        if not from_cache:
            raise UserError(f"split {split!r} of task {task.name!r} cannot be read ({described(error)})") from error
        reason = " ".join(str(error).split())
        raise UserError(
            f"the cache of task {task.name!r} in {task.cache_dir} is damaged or out of date ({reason}): delete it and "
            "build it again"
        ) from error


@contextlib.contextmanager
def in_storage_order() -> Iterator[None]:
    """Makes TFDS data sets that are built inside yield rows in storage order; TFDS interleaves files otherwise."""
    before = seqio.utils._TFDS_DATA_READ_CONFIG_OVERRIDE  # a module of tasks may have set one
    seqio.set_tfds_read_config_override(dataclasses.replace(before or tfds.ReadConfig(), interleave_cycle_length=1))
    try:
        yield
    finally:
        seqio.set_tfds_read_config_override(before)


def _names() -> list[str]:
    return [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]


def _check_split(task: seqio.Task, split: str) -> None:
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}: it has {', '.join(task.splits)}")


def _example(task: seqio.Task, split: str, raw: Mapping[str, Any]) -> Example:
    """Makes an Example of one element; missing features get defaults."""
    if "targets" not in raw:
        raise UserError(f"task {task.name!r} has no feature 'targets', only {', '.join(raw)}")
    try:
        return _decoded(task, raw)
    except UnicodeDecodeError as error:
        text = error.object[max(error.start - 30, 0) : error.end + 30]
        raise UserError(
            f"split {split!r} of task {task.name!r} has a text that is no UTF-8: byte "
            f"0x{error.object[error.start]:02x} in {text!r}"
        ) from error


def _decoded(task: seqio.Task, raw: Mapping[str, Any]) -> Example:
    inputs = _text(task, raw, "inputs") if "inputs" in raw else ""
    targets = _text(task, raw, "targets")
    return Example(
        task=task.name,
        id=_decode(raw["id"]) if "id" in raw else stable_hash(inputs, targets),
        inputs=inputs,
        targets=targets,
        labels=tuple(map(_decode, raw.get("labels", ()))),
        prefix=_decode(raw.get("prefix", b"")),
        shots=int(raw.get("shots", 0)),
        answers=tuple(map(_decode, raw.get("answers", ()))),
        suffix=_decode(raw.get("suffix", b"")),
        features=dict(raw),
    )


def _text(task: seqio.Task, raw: Mapping[str, Any], feature: str) -> str:
    """Returns a feature as text: `<feature>_pretokenized`, the feature itself, or its token ids decoded."""
    value = np.asarray(raw.get(f"{feature}_pretokenized", raw[feature]))
    if value.ndim == 0 and value.dtype.kind in "OSU":
        text = _decode(value.item())
        return text if getattr(task.source, "marked", False) else controls.unmarked(text)
    if value.ndim == 1 and value.dtype.kind in "iu":
        return str(task.output_features[feature].vocabulary.decode(value.tolist()))
    raise UserError(
        f"task {task.name!r} yields {feature!r} as {value.dtype} of shape {value.shape}: "
        "it must be one string or one row of token ids"
    )


def _decode(value: bytes | str | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
