"""The loss on the validation split, for the curve: it is measured as training measures its own, on other examples."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from promot_jax import trees
from promot_jax.data.packing import Packer
from promot_jax.experiments.session import Session
from promot_jax.models import Model
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import soft_prompts
from promot_jax.training.losses import chunked_cross_entropy

Array = jax.Array


class ValidationLoss:
    """Mean cross-entropy per target token of a session's fine-tuning task, in nats, without smoothing or dropout.

    Of `Evaluation.curve_target_examples` examples of `Evaluation.curve_split`, of each task of a mixture, with
    exemplars and soft prompts as in training; those longer than `TASK_FEATURE_LENGTHS` are left out, as in training.
    """

    def __init__(self, session: Session, prompt: trees.Tree | None):
        """Reads the examples; `prompt` are the soft prompts by name that are prepended to them, None for none."""
        lengths, settings = session.experiment.lengths, session.experiment.evaluation
        encoder, self._model, self._place = session.encoder(prompt), session.base.model, session.experiment.partitioner
        targets = lengths["targets"]
        inputs = lengths["inputs"] + max(map(len, encoder.prompt_ids.values()), default=0)
        encoded = map(encoder.tokens, _examples(session))
        fits = [t for t in encoded if len(t.inputs) <= inputs and len(t.targets) <= targets]
        parts = self._place.rows()
        most = max(settings.tokens_per_batch // (inputs + targets) // parts, 1) * parts
        size = min(most, -(-len(fits) // parts) * parts)
        batches: list[list[list[Tokens]]] = []
        for start in range(0, len(fits), size or 1):
            rows = [[tokens] for tokens in fits[start : start + size]]
            batches.append(rows + [[] for _ in range(size - len(rows))])
        packer = Packer(self._model, size, inputs, targets, devices=parts)
        shapes = packer.choose(batches)
        self._batches = [packer.layout(rows, shapes) for rows in batches]

    def __call__(self, params: trees.Tree) -> float | None:
        """The loss of parameters whose LoRA is merged; None where no example is short enough."""
        table, total, count = soft_prompts.table(params.get("prompt")), 0.0, 0.0
        for batch in self._batches:
            total += float(_summed_loss(self._model, params["model"], table, self._place.batch(batch)))
            count += float(batch["weights"].sum())
        return total / count if count else None


@functools.partial(jax.jit, static_argnames="model")
def _summed_loss(model: Model, params: Any, table: Array | None, batch: Any) -> Array:
    hidden = model.hidden(params, table, batch)
    return chunked_cross_entropy(model, params, hidden, batch["targets"], batch["weights"], 0.0)


def _examples(session: Session) -> Iterator[Any]:
    """The examples of the validation split, with their exemplars."""
    from promot_jax.data import examples as text
    from promot_jax.data import exemplars

    experiment, encoder = session.experiment, session.encoder()
    settings = experiment.evaluation
    for task in text.task_names(experiment.task):
        read = text.read(task, settings.curve_split, limit=settings.curve_target_examples)
        yield from exemplars.WithExemplars(
            iter(read),
            experiment.seed,
            lambda value: len(encoder.inputs(value)),
            experiment.lengths["inputs"],
        )
