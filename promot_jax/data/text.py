"""SeqIO tasks and mixtures as text: look them up by name, read them, stream them. Tokens are the model's business.

Our own tasks yield the features of `FEATURES`. Other SeqIO tasks plug in as they are: `inputs` and `targets` may be
text or token ids (then `*_pretokenized` is read, or the ids are decoded with the task's own vocabulary), and whatever
else is missing gets a default.
"""

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from promot_jax.errors import UserError, nearest

_SHOTS = re.compile(r"(?P<base>.+)_(?P<k>\d+)shot")


def _feature(dtype: tf.DType, rank: int) -> seqio.Feature:
    return seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=dtype, rank=rank)


# Exemplars come from so many rows of the training split, the first in storage order: a split of millions of rows is
# never read whole, and a smaller one always is.
POOL_ROWS = 10_000
# What each example of our own tasks carries. `shots` is the number of exemplars asked for; they are drawn when a
# model's tokenizer is at hand (`fewshot`), for how many fit depends on it.
FEATURES: Mapping[str, seqio.Feature] = {
    "inputs": _feature(tf.string, 0),
    "targets": _feature(tf.string, 0),
    "id": _feature(tf.string, 0),
    "labels": _feature(tf.string, 1),
    "prefix": _feature(tf.string, 0),
    "shots": _feature(tf.int32, 0),
    "answers": _feature(tf.string, 1),
    "suffix": _feature(tf.string, 0),
}


@dataclass(frozen=True)
class Example:
    """One example of a task, as text.

    Attributes:
      task: the name of the task it comes from, as registered (so "capital_4shot" in a 4-shot mixture).
      id: unique within the task, the same whatever the order or sharding of the data.
      inputs: the query, template filled in, without exemplars.
      targets: the answer, without a leading space.
      labels: the label set; empty when the task is open.
      prefix: post-processing cuts an output from the second occurrence of this on; "" cuts nothing.
      shots: exemplars to put in front.
      answers: all right answers where there are several; empty when only `targets` is right.
      suffix: the end of `inputs` that stays when an input that is too long is shortened before it; "" when `inputs`
        has to stay whole.
      features: everything the task yields, for its post-processor.
    """

    task: str
    id: str
    inputs: str
    targets: str
    labels: tuple[str, ...]
    prefix: str
    shots: int
    answers: tuple[str, ...] = ()
    suffix: str = ""
    features: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def import_tasks(modules: Sequence[str]) -> None:
    """Imports modules that register tasks. Raises UserError naming a module that cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError, ValueError) as error:
            raise UserError(
                f"task module {module!r} cannot be imported ({error}): check its name and the path"
            ) from None


def get(name: str) -> seqio.Task | seqio.Mixture:
    """Returns a task or mixture; `<name>_<k>shot` is registered at the first call when `<name>` is known.

    Raises:
      UserError: when there is no such task or mixture, naming the nearest one.
    """
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name)
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    match = _SHOTS.fullmatch(name)
    if match and match["base"] in _names():
        return _register_shots(name, get(match["base"]), int(match["k"]))
    raise UserError(f"no task or mixture is called {name!r}{nearest(name, _names())}")


def task_names(name: str) -> list[str]:
    """Returns the names of a mixture's tasks in the order they were registered in, or the task's own name."""
    provider = get(name)
    if isinstance(provider, seqio.Task):
        return [name]
    names = [task for part in provider.rate_per_task_name for task in task_names(part)]
    return list(dict.fromkeys(names))


def base_task(name: str) -> str:
    """Returns the name without its `_<k>shot` ending, unless that is part of a registered task's own name."""
    match = _SHOTS.fullmatch(name)
    return match["base"] if match and match["base"] in _names() else name


def read(name: str, split: str, *, limit: int | None = None, seed: int = 0, within: int | None = None) -> list[Example]:
    """Returns the examples of one task, in an order given by (seed, id) alone, not by how the data are stored.

    Args:
      name: a task; a mixture is read task by task.
      split: one of the task's splits.
      limit: how many at most; a larger limit returns the same ones and more.
      seed: chooses the order, and so the subset.
      within: only the first so many rows in storage order are read; None reads the whole split.

    Raises:
      UserError: when `name` is unknown or a mixture, or the task has no such split.
    """
    provider = get(name)
    if isinstance(provider, seqio.Mixture):
        raise UserError(f"{name!r} is a mixture: read its tasks one by one ({', '.join(task_names(name))})")
    _check_split(provider, split)
    data = provider.get_dataset(sequence_length=None, split=split, shuffle=False, try_in_mem_cache=False)
    if within is not None:
        data = data.take(within)
    examples = [_example(provider, raw) for raw in data.as_numpy_iterator()]
    examples.sort(key=lambda e: (stable_hash(str(seed), e.id), e.id, e.inputs))
    return examples[:limit]


def stream(name: str, split: str, *, seed: int) -> Iterator[Example]:
    """Returns an endless shuffled stream of a task's examples, or of a mixture's at its rates.

    The n-th example depends on (name, split, seed) only. The stream is never sharded: every host reads it whole and
    takes its own rows of each batch.

    Raises:
      UserError: when `name` is unknown, one of its tasks lacks the split, or the split is empty.
    """
    provider = get(name)
    tasks = [seqio.TaskRegistry.get(task) for task in task_names(name)]
    for task in tasks:
        _check_split(task, split)
    rates = np.array([1.0 if provider is task else provider.get_rate(task) for task in tasks])
    return _mix(tasks, rates / rates.sum(), split, seed)


def stable_hash(*parts: str) -> str:
    """Returns 16 hexadecimal digits that depend on the strings alone, in every process and on every machine."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _mix(tasks: Sequence[seqio.Task], rates: np.ndarray, split: str, seed: int) -> Iterator[Example]:
    """Yields from each task's own endless data set in turn, drawn with `rates` ([tasks], sum 1)."""
    streams = [
        task.get_dataset(
            sequence_length=None, split=split, shuffle=True, seed=seed, num_epochs=None, try_in_mem_cache=False
        ).as_numpy_iterator()
        for task in tasks
    ]
    draw = np.random.default_rng(seed)
    while True:
        i = int(draw.choice(len(tasks), p=rates))
        raw = next(streams[i], None)
        if raw is None:
            raise UserError(f"split {split!r} of task {tasks[i].name!r} has no examples")
        yield _example(tasks[i], raw)


def _names() -> list[str]:
    return [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]


def _register_shots(name: str, base: seqio.Task | seqio.Mixture, k: int) -> seqio.Task | seqio.Mixture:
    """Registers `base` again as `name`, with `shots` = k in each example. Mixtures keep their rates."""
    if isinstance(base, seqio.Mixture):
        parts = [(get(f"{part}_{k}shot").name, rate) for part, rate in base.rate_per_task_name.items()]
        return seqio.MixtureRegistry.add(name, parts)

    def ask(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {**example, "shots": tf.constant(k, tf.int32)})

    task = base.replace(
        name=name,
        preprocessors=[*base.preprocessors, ask],
        output_features={**base.output_features, "shots": FEATURES["shots"]},
    )
    seqio.TaskRegistry.add_provider(name, task)
    return task


def _check_split(task: seqio.Task, split: str) -> None:
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}: it has {', '.join(task.splits)}")


def _example(task: seqio.Task, raw: Mapping[str, Any]) -> Example:
    """Builds an Example from one element of a task's data set; missing features get defaults."""
    if "targets" not in raw:
        raise UserError(f"task {task.name!r} has no feature 'targets', only {', '.join(raw)}")
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
    """Returns a feature as text: its `_pretokenized` twin, the feature itself, or its token ids decoded."""
    value = np.asarray(raw.get(f"{feature}_pretokenized", raw[feature]))
    if value.ndim == 0 and value.dtype.kind in "OSU":
        return _decode(value.item())
    if value.ndim == 1 and value.dtype.kind in "iu":
        return str(task.output_features[feature].vocabulary.decode(value.tolist()))
    raise UserError(
        f"task {task.name!r} yields {feature!r} as {value.dtype} of shape {value.shape}: "
        "it must be one string or one row of token ids"
    )


def _decode(value: bytes | str | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
