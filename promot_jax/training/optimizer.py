"""Optimizers and schedules: settings that a run records, and the optax transformations that they describe."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promot_jax import trees
from promot_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer with its schedule."""

    name: str = "adafactor"  # the paper's; or "adamw"
    learning_rate: float = 1e-3  # peak; absolute, or relative to the parameter's scale (see `scale_by_parameter`)
    schedule: str = "constant"  # or "linear" or "cosine" decay to zero at the last step
    warmup_steps: int = 0  # of linear warm-up from zero, before the schedule
    clip_norm: float = 0.0  # bound of the gradients' global norm over the trained leaves; 0 is off
    weight_decay: float = 0.0  # decoupled; per step for adafactor (not times the learning rate), times it for adamw
    # Adafactor's own. Updates times the parameter's root mean square: in the paper's model tuning, not prompt tuning.
    scale_by_parameter: bool = True
    decay_rate: float = 0.8  # exponent of the second-moment decay `1 - step ** -decay_rate`
    # Added to the step in that decay; 0 is a fresh counter. T5X runs inherit the checkpoint's step (about 1.1M), so
    # their decay is close to 1 from the first step; prompt tuning's learning rates of 0.2 to 0.3 assume that.
    decay_offset: int = 0
    factored: bool = True  # second moments, for matrices with both sides of 128 or more; never for prompts
    # AdamW's own.
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Raises UserError for unknown names and values out of range."""
        for name, options in (("name", ("adafactor", "adamw")), ("schedule", ("constant", "linear", "cosine"))):
            if (value := getattr(self, name)) not in options:
                raise UserError(f"Unknown Optimizer.{name} {value!r}{nearest(value, options)}.")
        for name in ("learning_rate", "warmup_steps", "clip_norm", "weight_decay", "decay_offset"):
            if not 0 <= (number := getattr(self, name)) < float("inf"):
                raise UserError(f"Optimizer.{name} is {number}; it has to be finite and not negative.")

    def rate(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step, for a run of `steps` steps."""
        warmup, rest = self.warmup_steps, max(steps - self.warmup_steps, 1)
        decay = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
        }[self.schedule]
        if not warmup:
            return decay
        # (step + 1) / warmup: a first step at rate zero would be wasted.
        rise = optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, max(warmup - 1, 1))
        return optax.join_schedules([rise, decay], [warmup])

    def build(self, steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation for a run of `steps` steps, over the trained leaves only."""
        rate = self.rate(steps)
        if self.name == "adamw":
            core = optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        else:
            core = _adafactor(self, rate)
        return optax.chain(_clip(self.clip_norm), core) if self.clip_norm else core


@functools.lru_cache(maxsize=16)  # the same object for the same settings: a step that it is part of is compiled once
def build(steps: int, default: Optimizer, **subtrees: Optimizer | None) -> optax.GradientTransformation:
    """Returns the transformation for a run of `steps` steps; some parameter subtrees may have another optimizer.

    Args:
        steps: of the run.
        default: for all other subtrees together.
        **subtrees: first key of the parameters -> optimizer, None for `default`. Each clips its own gradients' norm.
    """
    transforms = {name: optimizer.build(steps) for name, optimizer in subtrees.items() if optimizer is not None}
    if not transforms:
        return _in_float32(default.build(steps))

    def labels(params: trees.Tree) -> trees.Tree:
        return {name: name if name in transforms else "default" for name in params}  # a prefix of the tree

    return _in_float32(optax.partition(transforms | {"default": default.build(steps)}, labels))


def apply_updates(params: trees.Tree, updates: trees.Tree, key: jax.Array) -> trees.Tree:
    """Returns parameters plus updates; bfloat16 leaves are rounded stochastically, which is unbiased.

    With rounding to nearest, a weight would ignore every update smaller than 1/512 of itself.

    Args:
        params: float32 or bfloat16.
        updates: float32, of the same structure.
        key: random key of the step.
    """

    def add(leaf: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bfloat16:
            return stochastic_round(leaf.astype(jnp.float32) + update, key)
        return leaf + update

    leaves, structure = jax.tree.flatten(params)
    keys = jax.tree.unflatten(structure, jax.random.split(key, len(leaves)))
    return jax.tree.map(add, params, updates, keys)


def stochastic_round(values: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two nearest bfloat16 values, to the nearer with the higher probability."""
    # bfloat16 is the upper half of float32's bits: adding random bits to the lower half carries into the upper half.
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(values, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(values), rounded, values).astype(jnp.bfloat16)


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.clip_by_global_norm`, whose `update` may be given the norm, to clip a part of the gradients."""

    def update(grads: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(lambda leaf: jnp.where(norm < most, leaf, leaf / norm * most), grads), state

    return optax.GradientTransformationExtraArgs(optax.clip_by_global_norm(most).init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation with parameters and gradients cast to float32."""
    inner = optax.with_extra_args_support(inner)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    return optax.GradientTransformationExtraArgs(
        lambda params: inner.init(cast(params)),
        lambda grads, state, params=None, **extra: inner.update(cast(grads), state, cast(params), **extra),
    )


def _adafactor(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns Adafactor as in T5X: one block per layer of a stack, unfactored prompts, a counter that continues.

    optax subtracts its `decay_offset` from the step (a restart), hence the sign. Its update clipping and parameter
    scale are root mean squares over a leaf, which would mix the layers of a stack, hence the `vmap`.
    """

    def adafactor(factored: bool) -> optax.GradientTransformationExtraArgs:
        return optax.adafactor(
            rate,
            decay_rate=settings.decay_rate,
            decay_offset=-settings.decay_offset,
            multiply_by_parameter_scale=settings.scale_by_parameter,
            clipping_threshold=1.0,
            weight_decay_rate=settings.weight_decay or None,
            factored=factored,
        )

    plain = adafactor(settings.factored)
    per_layer = optax.GradientTransformation(
        jax.vmap(plain.init), lambda grads, state, params: jax.vmap(plain.update)(grads, state, params)
    )

    def grouped(params: trees.Tree) -> optax.GradientTransformationExtraArgs:
        labels = {path: _group(path) for path in trees.flatten(params)}
        transforms = dict.fromkeys(labels.values(), per_layer) | {"prompt": adafactor(factored=False), "rest": plain}
        return optax.partition(transforms, trees.unflatten(labels))

    return optax.GradientTransformation(
        lambda params: grouped(params).init(params),
        lambda grads, state, params: grouped(params).update(grads, state, params),
    )


def _group(path: str) -> str:
    """Returns "prompt", the stack of scanned layers that a path belongs to (`model/decoder/layers/`), or "rest"."""
    if path.startswith("prompt/"):
        return "prompt"
    head, separator, _ = path.partition("/layers/")
    return head + separator if separator else "rest"
