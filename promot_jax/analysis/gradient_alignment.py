"""Gradient alignment: what a batch teaches besides its labels (paper, figures 3 and 7).

The gradient of a batch is compared with that of the same inputs and the same targets, dealt out among the rows anew.
Where both point the same way, the step teaches what any target of the task has in common, its format; where they do
not, it teaches which input has which target.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from promot_jax import trees
from promot_jax.distributed import preemption
from promot_jax.models import Model
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import lora, soft_prompts
from promot_jax.results.schema import Alignment, GradientAlignment
from promot_jax.training.losses import chunked_cross_entropy

if TYPE_CHECKING:
    from promot_jax.analysis.trained_stage import Revisited

Array = jax.Array
Tree = trees.Tree
Cosines = dict[str, dict[str, Array]]

SCOPES = ("last decoder layer", "all layers")
# By the name of the module in a parameter's path; cross-attention counts with self-attention.
GROUPS = {"MLP": "/mlp/", "query": "/query/", "key": "/key/", "value": "/value/", "all": "/"}


def shuffled(rows: Sequence[Sequence[Tokens]], rng: np.random.Generator) -> list[list[Tokens]]:
    """The same inputs with the targets of one another: a random permutation, as the paper's.

    A target may stay where it is, and with few labels many rows keep theirs; `changed` says how many do not.

    Args:
        rows: one sequence each.
        rng: chooses the permutation.
    """
    order = rng.permutation(len(rows))
    return [[Tokens(row[0].inputs, rows[other][0].targets)] for row, other in zip(rows, order, strict=True)]


def changed(rows: Sequence[Sequence[Tokens]], others: Sequence[Sequence[Tokens]]) -> float:
    """Share of rows, in [0, 1], whose targets differ."""
    return float(np.mean([row[0].targets != other[0].targets for row, other in zip(rows, others, strict=True)]))


def measure(model: Model, label_smoothing: float) -> Callable[[Tree, Array | None, Tree, Tree], Cosines]:
    """Builds `(params, table, batch, other) -> {scope: {group: cosine}}`, jitted.

    `params` is `params["model"]`, `table` the soft prompts (`prompts.table`) or None, both batches are laid out for the
    model. The gradients are those of the training loss without dropout, and never leave the devices. A cosine is NaN
    where a gradient is zero.

    Args:
        model: without dropout.
        label_smoothing: of the loss, as in training.
    """

    def loss(layers: Tree, others: Tree, table: Array | None, batch: Tree) -> Array:
        params = trees.merge(layers, others)
        hidden = model.hidden(params, table, batch)
        return chunked_cross_entropy(model, params, hidden, batch["targets"], batch["weights"], label_smoothing)

    @jax.jit
    def cosines(params: Tree, table: Array | None, batch: Tree, other: Tree) -> Cosines:
        layers, others = trees.partition(params, lambda path: "/layers/" in path)
        first, second = (trees.flatten(jax.grad(loss)(layers, others, table, one)) for one in (batch, other))
        products = {path: _products(first[path], second[path]) for path in first}
        return {scope: {name: _cosine(products, scope, part) for name, part in GROUPS.items()} for scope in SCOPES}

    return cosines


def _products(a: Array, b: Array) -> Array:
    """`a b`, `a a` and `b b` of each layer, `[3, layers]`; layers are the leading axis of both."""
    first, second = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in (a, b))
    return jnp.stack([(first * second).sum(axis=1), (first * first).sum(axis=1), (second * second).sum(axis=1)])


def _cosine(products: dict[str, Array], scope: str, part: str) -> Array:
    """Cosine over the parameters of a group, taken as one vector."""
    last = scope == SCOPES[0]
    members = [
        value[:, -1] if last else value.sum(axis=1)
        for path, value in products.items()
        if part in path and (not last or path.startswith("decoder/"))
    ]
    product, first, second = jnp.stack(members).sum(axis=0)
    return product / jnp.sqrt(first * second)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and range of the cosines of several batches; None where a gradient was zero."""
    array = np.asarray(values, np.float64)
    spread = {"mean": array.mean(), "std": array.std(ddof=1) if len(array) > 1 else 0.0}
    spread |= {"low": array.min(), "high": array.max()}
    return {name: float(value) if np.isfinite(value) else None for name, value in spread.items()} | {"n": len(array)}


def along(run: "Revisited", steps: Sequence[int], count: int) -> GradientAlignment:
    """Gradient alignment of a stage at some of its steps, on its own first batches.

    Behind the prompt where the stage had one, and without it; with its LoRA merged into the kernels, whose gradients
    are looked at. The shuffles are the same at every step.

    Args:
        run: the stage.
        steps: whose parameters are there (`run.steps()`).
        count: batches.

    Raises:
        PreemptedError: between two gradients.
    """
    session, training = run.session, run.settings["training"]
    model, partitioner = session.base.model, session.experiment.partitioner
    shares: list[float] = []

    def pair(rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> tuple[Any, Any]:
        others = shuffled(rows, np.random.default_rng((session.experiment.seed, len(shares) % count)))
        shares.append(changed(rows, others))
        return model.layout(rows, inputs, targets), model.layout(others, inputs, targets)

    names = dict.fromkeys((run.prompt, ""))
    pairs = {name: list(itertools.islice(run.batches(bool(name), pair), count)) for name in names}
    cosines = measure(model, training["label_smoothing"])
    points: list[Alignment] = []
    for step in steps:
        params = lora.merge(run.at(step), run.lora)
        for name, members in pairs.items():
            table = soft_prompts.table(params["prompt"]) if name else None
            values = []
            for both in members:
                placed = [partitioner.batch(one) for one in both]
                values.append(jax.device_get(cosines(params["model"], table, *placed)))
                preemption.check("between two gradients, which are computed anew")
            for scope, part in itertools.product(SCOPES, GROUPS):
                spread = summary([value[scope][part] for value in values])
                points.append(Alignment(step=step, prompt=name, scope=scope, group=part, **spread))
            print(f"step {step}{f', behind {name}' if name else ''}: {_told(points[-len(GROUPS) * 2 :])}", flush=True)
    return GradientAlignment(
        job="gradient_alignment",
        run=str(run.folder),
        stage=run.settings["stage"],
        task=session.experiment.task,
        model=session.experiment.checkpoint,
        base=session.base.base,
        seed=session.experiment.seed,
        batches=count,
        batch_size=training["batch_size"],
        label_smoothing=training["label_smoothing"],
        changed=float(np.mean(shares)),
        points=points,
    )


def _told(points: Sequence[Alignment]) -> str:
    """`last decoder layer: MLP 0.98, query 0.97, ...; all layers: ...`."""
    parts = []
    for scope in SCOPES:
        members = [point for point in points if point.scope == scope]
        numbers = [f"{one.group} {'-' if one.mean is None else format(one.mean, '.2f')}" for one in members]
        parts.append(f"{scope}: {', '.join(numbers)}")
    return "; ".join(parts)
