"""The training stream of a run: from a task's text to batches, each example with its task's soft prompt prepended."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from promot_jax import trees
from promot_jax.data import replay
from promot_jax.data.packing import PackedBatches, Packer
from promot_jax.data.replay import Replay
from promot_jax.experiments.session import Session
from promot_jax.models import Model
from promot_jax.training.settings import Training

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.data.batches import ShardedBatches
    from promot_jax.data.exemplars import WithExemplars

    Stream = ShardedBatches | PackedBatches

# Examples from whose lengths the shape of packed batches is chosen, and batches of them at most.
_EXAMPLES, _BATCHES = 2048, 64


def train_batches(
    session: Session,
    prompt: trees.Tree | None,
    *,
    batch_size: int,
    layout: Callable[..., Any],
    pack: bool = False,
    generic: Replay | None = None,
    whole: bool = False,
) -> "tuple[dict[int, WithExemplars], ShardedBatches]":
    """The training stream of a session's task, from step 0 on: a function of the experiment alone.

    Args:
        session: the data and the seed.
        prompt: soft prompts by name; an example has that of its own task prepended, else the mixture's, else none.
        batch_size: rows.
        layout: of the model's family (`Model.layout`).
        pack: several examples per row.
        generic: text to replay among the examples.
        whole: whether this host reads the rows of others too.

    Returns:
        The examples by shard of the data, which count the exemplars that did not fit, and the batches.
    """
    from promot_jax.data import batches, exemplars
    from promot_jax.data import examples as text

    experiment, lengths = session.experiment, session.experiment.lengths
    unprompted = session.encoder()
    examples: dict[int, exemplars.WithExemplars] = {}

    def open_shard(shard: int) -> batches.TrainBatches:
        part: dict[str, int] = {"seed": experiment.seed, "shard": shard, "shards": experiment.data_shards}
        examples[shard] = exemplars.WithExemplars(
            text.stream(experiment.task, "train", **part),
            experiment.seed,
            lambda value: len(unprompted.inputs(value)),
            lengths["inputs"],
        )
        passages = None
        if generic:
            texts = text.stream(generic.task, "train", **part)
            passages = replay.passages(texts, unprompted, lengths["inputs"], generic.targets)
        return batches.TrainBatches(
            examples[shard],
            session.encoder(prompt),
            layout,
            batch_size=batch_size // experiment.data_shards,
            feature_lengths=dict(lengths),
            pack=pack,
            replay=generic,
            passages=passages,
            part=(shard, experiment.data_shards),
        )

    rows_here = np.ones(batch_size, bool) if whole else experiment.partitioner.held_rows(batch_size)
    return examples, batches.ShardedBatches(open_shard, experiment.data_shards, rows_here)


def stage_batches(
    session: Session, prompt: trees.Tree | None, model: Model, training: Training, generic: Replay | None
) -> "tuple[dict[int, WithExemplars], Stream]":
    """The training stream of a stage; with `Training.pack_batch` its batches run in as few rows as they need.

    Arguments and result as of `train_batches`.
    """
    examples, stream = train_batches(
        session,
        prompt,
        batch_size=training.batch_size,
        layout=model.layout,
        pack=training.pack,
        generic=generic,
        whole=training.pack_batch,
    )
    if not training.pack_batch:
        return examples, stream
    lengths = next(iter(stream.parts.values())).lengths
    devices = session.experiment.partitioner.rows()
    packer = Packer(model, training.batch_size, *lengths, microbatches=training.microbatches, devices=devices)
    look_ahead = min(_BATCHES, training.steps, max(_EXAMPLES // training.batch_size, 1))
    return examples, PackedBatches(stream.parts, packer, look_ahead, training.steps)
