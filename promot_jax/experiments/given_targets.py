"""Losses and divergences on examples with their targets given (teacher forcing), as training measures its own."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from promot_jax import trees
from promot_jax.data.packing import Packer
from promot_jax.distributed.forward_programs import jit_forward
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.experiments.log_likelihood import log_likelihoods
from promot_jax.experiments.session import Session
from promot_jax.models import Model
from promot_jax.models.batch_layout import Batch, Tokens
from promot_jax.params import soft_prompts
from promot_jax.training.losses import chunked_cross_entropy, chunked_divergence

# TensorFlow comes in with the data, after the settings have been checked: what needs it is imported in functions.
if TYPE_CHECKING:
    from promot_jax.data.examples import Example

Array = jax.Array
TRAIN = "train"  # the split that is trained on


class GivenTargets:
    """Encoded examples, on which parameters are measured; without label smoothing or dropout."""

    def __init__(self, model: Model, partitioner: Partitioner, examples: Sequence[Tokens], tokens_per_batch: int):
        """Takes the examples; batches have at most so many tokens, but one row per data shard at least."""
        self._model, self._place = model, partitioner
        self._examples, self._tokens_per_batch = examples, tokens_per_batch

    @functools.cached_property
    def _batches(self) -> list[Batch]:
        examples, parts = self._examples, self._place.rows()
        inputs = max((len(tokens.inputs) for tokens in examples), default=0)
        targets = max((len(tokens.targets) for tokens in examples), default=0)
        most = max(self._tokens_per_batch // max(inputs + targets, 1) // parts, 1) * parts
        size = min(most, -(-len(examples) // parts) * parts)
        batches: list[list[list[Tokens]]] = []
        for start in range(0, len(examples), size or 1):
            rows = [[tokens] for tokens in examples[start : start + size]]
            batches.append(rows + [[] for _ in range(size - len(rows))])
        packer = Packer(self._model, size, inputs, targets, devices=parts)
        shapes = packer.choose(batches)
        return [packer.layout(rows, shapes) for rows in batches]

    def loss(self, params: trees.Tree) -> float | None:
        """Mean cross-entropy per target token, in nats; None without examples.

        Args:
            params: `{"model": ..., "prompt": {task: rows}}`, LoRA merged.
        """
        table = soft_prompts.table(params.get("prompt"))
        return self._mean(functools.partial(_summed_loss, self._model, params["model"], table))

    def divergence(self, base: trees.Tree, model: trees.Tree) -> float | None:
        """Mean KL(base || model) of the next token over the target tokens, in nats; None without examples."""
        return self._mean(functools.partial(_summed_divergence, self._model, base, model))

    def losses(self, params: trees.Tree) -> list[float]:
        """Mean cross-entropy per target token of each example, in nats; `params` as in `loss`."""
        table = soft_prompts.table(params.get("prompt"))
        sizes = self._place, self._tokens_per_batch
        scored = log_likelihoods(self._model, params["model"], table, self._examples, *sizes)
        return [-total / len(tokens.targets) for tokens, (total, _) in zip(self._examples, scored, strict=True)]

    def _mean(self, summed: Any) -> float | None:
        total = sum(float(summed(self._place.batch(batch))) for batch in self._batches)
        count = sum(float(batch["weights"].sum()) for batch in self._batches)
        return total / count if count else None


def of_target(session: Session, prompt: trees.Tree | None, split: str, limit: int) -> GivenTargets:
    """The first examples of the fine-tuning task, of each task of a mixture, with exemplars as in training.

    Args:
        session: the run's.
        prompt: soft prompts by name that are prepended to them, None for none.
        split: of the task.
        limit: of examples per task, of `train` among its first rows. Those longer than `TASK_FEATURE_LENGTHS` are left
            out, as in training.
    """
    lengths, encoder = session.experiment.lengths, session.encoder(prompt)
    inputs = lengths["inputs"] + max(map(len, encoder.prompt_ids.values()), default=0)
    encoded = map(encoder.tokens, _examples(session, session.experiment.task, split, limit, lengths["inputs"]))
    fits = [t for t in encoded if len(t.inputs) <= inputs and len(t.targets) <= lengths["targets"]]
    return _given(session, fits)


def of_icl(session: Session) -> GivenTargets:
    """The ICL examples of the curve (`Evaluation.curve_examples`, `curve_shots`), each with exemplars of its task."""
    settings, encoder = session.experiment.evaluation, session.encoder()
    name = f"{session.experiment.icl_mixture}_{settings.curve_shots}shot"
    read = _examples(session, name, settings.curve_split, settings.curve_examples, settings.max_input_length)
    return _given(session, [encoder.tokens(example) for example in read])


def _given(session: Session, examples: Sequence[Tokens]) -> GivenTargets:
    experiment = session.experiment
    return GivenTargets(session.base.model, experiment.partitioner, examples, experiment.evaluation.tokens_per_batch)


@functools.partial(jit_forward, static_argnums=0)
def _summed_loss(model: Model, params: Any, table: Array | None, batch: Any) -> Array:
    hidden = model.hidden(params, table, batch)
    return chunked_cross_entropy(model, params, hidden, batch["targets"], batch["weights"], 0.0)


@functools.partial(jit_forward, static_argnums=0)
def _summed_divergence(model: Model, base: Any, params: Any, batch: Any) -> Array:
    hidden, base_hidden = (model.hidden(each, None, batch) for each in (params, base))
    return chunked_divergence(model, params, hidden, base, base_hidden, batch["weights"])


def _examples(session: Session, name: str, split: str, limit: int, max_tokens: int) -> "list[Example]":
    """Examples of a task or of each task of a mixture, with their exemplars."""
    from promot_jax.data import examples as text
    from promot_jax.data import exemplars

    encoder = session.encoder()
    with_exemplars = functools.partial(
        exemplars.WithExemplars,
        seed=session.experiment.seed,
        count_tokens=lambda value: len(encoder.inputs(value)),
        max_tokens=max_tokens,
    )
    found: list[Example] = []
    for task in text.task_names(name):
        # Of millions of rows the first ones.
        rows = text.ordered(text.first_rows(text.get(task), split)) if split == TRAIN else text.read(task, split)
        found += with_exemplars(iter(rows[:limit]))
    return found
