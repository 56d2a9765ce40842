"""Gradient alignment: what a batch teaches besides its labels (paper, figures 3 and 7).

The gradient of a batch is compared with the gradient of the same inputs with shuffled targets. As far as both agree,
the step teaches what all targets of the task have in common, its format; otherwise it teaches which input has which
target.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
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
    """Permutes the targets of rows of one sequence each, as the paper does.

    A target may stay in its row, and with few labels many rows keep theirs; `changed` is the share of rows that do not.
    """
    order = rng.permutation(len(rows))
    return [[Tokens(row[0].inputs, rows[other][0].targets)] for row, other in zip(rows, order, strict=True)]


def changed(rows: Sequence[Sequence[Tokens]], permuted: Sequence[Sequence[Tokens]]) -> float:
    """Share of rows, in [0, 1], whose targets differ."""
    return float(np.mean([row[0].targets != other[0].targets for row, other in zip(rows, permuted, strict=True)]))


def measure(model: Model, label_smoothing: float) -> Callable[[Tree, Array | None, Tree, Tree], Cosines]:
    """Returns `(params, table, batch, shuffled batch) -> {scope: {group: cosine}}` of a model without dropout.

    `params` is `params["model"]`, `table` the soft prompts (`soft_prompts.table`) or None. The gradients are of the
    training loss, and stay on the devices. A cosine is NaN where a gradient is zero.
    """
    return partial(_cosines, model, label_smoothing)


@partial(jax.jit, static_argnums=(0, 1))
def _cosines(
    model: Model, label_smoothing: float, params: Tree, table: Array | None, batch: Tree, other: Tree
) -> Cosines:
    def loss(layers: Tree, rest: Tree, rows: Tree) -> Array:
        merged = trees.merge(layers, rest)
        hidden = model.hidden(merged, table, rows)
        return chunked_cross_entropy(model, merged, hidden, rows["targets"], rows["weights"], label_smoothing)

    layers, rest = trees.partition(params, lambda path: "/layers/" in path)
    first, second = (trees.flatten(jax.grad(loss)(layers, rest, rows)) for rows in (batch, other))
    products = {path: _products(first[path], second[path]) for path in first}
    return {scope: {name: _cosine(products, scope, part) for name, part in GROUPS.items()} for scope in SCOPES}


def _products(a: Array, b: Array) -> Array:
    """Dot products `a b`, `a a` and `b b` of each layer, `[3, layers]`; layers are the leading axis of both."""
    first, second = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in (a, b))
    return jnp.stack([(first * second).sum(axis=1), (first * first).sum(axis=1), (second * second).sum(axis=1)])


def _cosine(products: dict[str, Array], scope: str, part: str) -> Array:
    """Cosine over the parameters of a group, as one vector."""
    last = scope == SCOPES[0]
    members = [
        value[:, -1] if last else value.sum(axis=1)
        for path, value in products.items()
        if part in path and (not last or path.startswith("decoder/"))
    ]
    product, first, second = jnp.stack(members).sum(axis=0)
    return product / jnp.sqrt(first * second)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and range of the cosines of several batches; None if a gradient was zero."""
    array = np.asarray(values, np.float64)
    spread = {"mean": array.mean(), "std": array.std(ddof=1) if len(array) > 1 else 0.0}
    spread |= {"low": array.min(), "high": array.max()}
    return {name: float(value) if np.isfinite(value) else None for name, value in spread.items()} | {"n": len(array)}


def along(run: "Revisited", steps: Sequence[int], count: int) -> GradientAlignment:
    """Measures gradient alignment of a stage at some of its steps, on its own first batches.

    Measured with the stage's soft prompt prepended, if it had one, and without; a LoRA is merged into the kernels,
    whose gradients count. The shuffles are the same at every step.

    Args:
        run: the stage.
        steps: steps whose parameters exist (`run.steps()`).
        count: batches.

    Raises:
        PreemptedError: between two gradients.
    """
    session, training = run.session, run.settings["training"]
    model, partitioner = session.base.model, session.experiment.partitioner
    shares: list[float] = []

    def pair(rows: Sequence[Sequence[Tokens]], inputs: int, targets: int) -> tuple[Any, Any]:
        permuted = shuffled(rows, np.random.default_rng((session.experiment.seed, len(shares) % count)))
        shares.append(changed(rows, permuted))
        return model.layout(rows, inputs, targets), model.layout(permuted, inputs, targets)

    prompts = dict.fromkeys((run.prompt, ""))
    pairs = {prompt: list(itertools.islice(run.batches(bool(prompt), pair), count)) for prompt in prompts}
    cosines = measure(model, training["label_smoothing"])
    points: list[Alignment] = []
    for step in steps:
        params = lora.merge(run.at(step), run.lora)
        for prompt, batches in pairs.items():
            table = soft_prompts.table(params["prompt"]) if prompt else None
            values = []
            for both in batches:
                values.append(jax.device_get(cosines(params["model"], table, *map(partitioner.batch, both))))
                preemption.check("between two gradients, which are computed anew")
            line = f"step {step}" + (f", with soft prompt {prompt}" if prompt else "")
            for scope in SCOPES:
                spreads = {group: summary([value[scope][group] for value in values]) for group in GROUPS}
                points += [
                    Alignment(step=step, prompt=prompt, scope=scope, group=group, **spread)
                    for group, spread in spreads.items()
                ]
                means = {group: spread["mean"] for group, spread in spreads.items()}
                shown = (f"{group} -" if mean is None else f"{group} {mean:.2f}" for group, mean in means.items())
                line += f"; {scope}: {', '.join(shown)}"
            print(line, flush=True)
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
