"""A run's data before its model is loaded: how long its examples are, and what is left out of training."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from promot_jax.checkpoints.pretrained import ModelText
from promot_jax.experiments.settings import Experiment, with_exemplars

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.data.lengths import Lengths

_FAR = 2  # times the 99th percentile: inputs that long make every row that long


def with_lengths(experiment: Experiment, text: ModelText) -> Experiment:
    """The experiment with `feature_lengths` of its task: those given, or the longest of its data.

    The longest of `train` and `Evaluation.curve_split` count, but inputs are no longer than
    `Evaluation.max_input_length`: a few very long ones would make all rows that long.
    """
    if not experiment.task or experiment.given_lengths:
        return dataclasses.replace(experiment, feature_lengths=experiment.given_lengths)
    from promot_jax.data.examples import base_and_shots, task_names
    from promot_jax.data.lengths import measure

    settings, lengths = experiment.evaluation, {"inputs": 1, "targets": 1}
    for name in task_names(experiment.task):
        task, shots = base_and_shots(name)
        longest = {"inputs": 1, "targets": 1}
        for split in ("train", settings.curve_split):
            found = measure(task, split, text.vocabulary, text.continues).longest
            longest = {key: max(longest[key], found[key]) for key in longest}
        longest["inputs"] = min(longest["inputs"], settings.max_input_length)
        longest = with_exemplars(longest, shots)
        lengths = {key: max(lengths[key], longest[key]) for key in lengths}
    return dataclasses.replace(experiment, feature_lengths=lengths)


def report(experiment: Experiment, text: ModelText) -> None:
    """Prints rows, classes, repetitions and token lengths of the training task's splits, and what is left out.

    Args:
        experiment: whose lengths are known (`with_lengths`).
        text: tokenizer of the model.

    Raises:
        UserError: no training example of a class fits the lengths.
    """
    from promot_jax.data.examples import base_task, task_names
    from promot_jax.data.lengths import measure

    settings, limits = experiment.evaluation, experiment.lengths
    for task in dict.fromkeys(map(base_task, task_names(experiment.task))):
        print(f"Task {task!r}, in tokens of {experiment.checkpoint}:", flush=True)
        for split in dict.fromkeys(("train", settings.curve_split, settings.split)):
            found = measure(task, split, text.vocabulary, text.continues)
            print(f"  {split}: {found.sentence()}.", flush=True)
        train = measure(task, "train", text.vocabulary, text.continues)
        train.check(task, limits)
        print(f"  {_left_out(train, limits)}", flush=True)
        _warn_of_outputs(experiment, train)


def _left_out(train: "Lengths", limits: Mapping[str, int]) -> str:
    """What the lengths leave out of training, by class; and whether a few long inputs make all rows long."""
    left_out, classes = train.left_out(limits), train.classes()
    line = f"TASK_FEATURE_LENGTHS = {dict(limits)}: "
    if not left_out:
        line += "no training row is left out."
        inputs = sorted(row.inputs for row in train.rows)
        most = inputs[int(0.99 * (len(inputs) - 1))]
        if limits["inputs"] > _FAR * most:
            line += f" 99 % of the inputs have at most {most} tokens: that length trains faster."
        return line
    parts = [f"{label!r} {count:,} of {classes[label]:,}" for label, count in sorted(left_out.items()) if label]
    return (
        line
        + f"{left_out.total():,} of {len(train.rows):,} training rows are longer and left out"
        + (f" ({', '.join(parts)})." if parts else ".")
    )


def _warn_of_outputs(experiment: Experiment, train: "Lengths") -> None:
    """Says which targets no output can equal, since outputs end earlier."""
    decoding = experiment.evaluation.decoding
    longest = train.longest["targets"]
    if longest > decoding.max_tokens:
        count = sum(row.targets > decoding.max_tokens for row in train.rows)
        print(
            f"  Warning: {count:,} targets are longer than outputs can be (Decoding.max_tokens = "
            f"{decoding.max_tokens}); --gin.Decoding.max_tokens={longest} has room for all.",
            flush=True,
        )
    if train.lines and decoding.stop and decoding.stop in "\n":
        print(
            f"  Warning: {train.lines:,} targets have several lines, and outputs end at the first line break; "
            "--gin.Decoding.stop='' lets them go on.",
            flush=True,
        )
