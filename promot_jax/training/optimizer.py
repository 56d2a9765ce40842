"""Optimizers and schedules, as data that a run can record."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from promot_jax import trees
from promot_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer with its schedule.

    Attributes:
        name: "adafactor" (the paper's) or "adamw".
        learning_rate: peak; absolute, or relative to the parameter's scale (see `scale_by_parameter`).
        schedule: "constant", "linear" or "cosine", the latter two down to zero at the last step.
        warmup_steps: of linear warm-up from zero, before the schedule.
        clip_norm: global norm over the trained leaves that gradients are clipped to; 0 is off.
        weight_decay: decoupled; per step for adafactor (not times the learning rate), times the rate for adamw.
        scale_by_parameter: adafactor: multiply updates by the parameter's root mean square. The paper's model
            tuning does, prompt tuning does not.
        decay_rate: adafactor: exponent of the second-moment decay `1 - step ** -decay_rate`.
        decay_offset: adafactor: added to the step in that decay. T5X runs inherit the checkpoint's step (about 1.1M),
            so their decay is close to 1 from the first step, which is what prompt tuning's learning rates of 0.2 to
            0.3 belong to. 0 is a fresh counter.
        factored: adafactor: factored second moments for matrices with both sides of 128 or more; never for prompts.
        b1: adamw.
        b2: adamw.
        eps: adamw.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float = 0.0
    weight_decay: float = 0.0
    scale_by_parameter: bool = True
    decay_rate: float = 0.8
    decay_offset: int = 0
    factored: bool = True
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Raises UserError for names that are not known and values out of range."""
        for name, options in (("name", ("adafactor", "adamw")), ("schedule", ("constant", "linear", "cosine"))):
            given = getattr(self, name)
            if given not in options:
                raise UserError(f"Unknown Optimizer.{name} {given!r}{nearest(given, options)}.")
        for name in ("learning_rate", "warmup_steps", "clip_norm", "weight_decay", "decay_offset"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"Optimizer.{name} is {getattr(self, name)}; it has to be finite and not negative.")

    def rate(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step, for a run of `steps` steps."""
        warmup, rest = self.warmup_steps, max(steps - self.warmup_steps, 1)
        bodies = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
        }
        if not warmup:
            return bodies[self.schedule]
        # (step + 1) / warmup: a first step at rate zero would be wasted.
        rise = optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, max(warmup - 1, 1))
        return optax.join_schedules([rise, bodies[self.schedule]], [warmup])

    def build(self, steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation for a run of `steps` steps, over the trained leaves only."""
        rate = self.rate(steps)
        if self.name == "adamw":
            core = optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        else:
            core = _adafactor(self, rate)
        if self.clip_norm:
            return optax.chain(optax.clip_by_global_norm(self.clip_norm), core)
        return core


def build(steps: int, default: Optimizer, **rooms: Optimizer | None) -> optax.GradientTransformation:
    """Returns the transformation for a run of `steps` steps in which some rooms have an optimizer of their own.

    Args:
        steps: of the run.
        default: of every room without one; of the whole tree at once where no room has one.
        **rooms: by the first key of the parameters; None for `default`. Each clips its own gradients' norm.
    """
    own = {room: one.build(steps) for room, one in rooms.items() if one is not None}
    if not own:
        return _in_float32(default.build(steps))

    def labels(params: trees.Tree) -> trees.Tree:
        return {room: room if room in own else "default" for room in params}  # a prefix of the tree

    return _in_float32(optax.partition(own | {"default": default.build(steps)}, labels))


def apply_updates(params: trees.Tree, updates: trees.Tree, key: jax.Array) -> trees.Tree:
    """Adds updates to parameters; those held in bfloat16 are rounded up or down at random, right in the mean.

    Rounded to the nearest, a weight would not move at all by less than a 512th of itself.

    Args:
        params: float32 or bfloat16.
        updates: float32, of the same structure.
        key: of the step.
    """
    flat, moves = trees.flatten(params), trees.flatten(updates)
    keys = dict(zip(flat, jax.random.split(key, len(flat)), strict=True))
    added = {
        path: stochastic_round(leaf.astype(jnp.float32) + moves[path], keys[path])
        if leaf.dtype == jnp.bfloat16
        else leaf + moves[path]
        for path, leaf in flat.items()
    }
    return trees.unflatten(added)


def stochastic_round(values: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two bfloat16 beside each value, to the nearer one the more often."""
    # bfloat16 is the upper half of float32: of the lower half, a random number carries over into it.
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(values, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(values), rounded, values).astype(jnp.bfloat16)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same in float32, whatever parameters and gradients are held in."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: inner.init(cast(params)),
        lambda grads, state, params=None: inner.update(cast(grads), state, cast(params)),
    )


def _adafactor(settings: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor as in T5X: each layer of a stack is a block of its own, prompts stay unfactored, the counter continues.

    optax subtracts its `decay_offset` from the step (a restart), hence the sign. Its update clipping and parameter
    scale are root mean squares over a leaf, which for stacked layers would mix all of them, hence the `vmap`.
    """

    def make(factored: bool) -> optax.GradientTransformationExtraArgs:
        return optax.adafactor(
            rate,
            decay_rate=settings.decay_rate,
            decay_offset=-settings.decay_offset,
            multiply_by_parameter_scale=settings.scale_by_parameter,
            clipping_threshold=1.0,
            weight_decay_rate=settings.weight_decay or None,
            factored=factored,
        )

    plain = make(settings.factored)

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.vmap(plain.update)(grads, state, params)

    per_layer = optax.GradientTransformation(jax.vmap(plain.init), update)

    def grouped(params: trees.Tree) -> optax.GradientTransformationExtraArgs:
        labels = {path: _group(path) for path in trees.flatten(params)}
        transforms = dict.fromkeys(labels.values(), per_layer) | {"prompt": make(False), "rest": plain}
        return optax.partition(transforms, trees.unflatten(labels))

    return optax.GradientTransformation(
        lambda params: grouped(params).init(params),
        lambda grads, state, params: grouped(params).update(grads, state, params),
    )


def _group(path: str) -> str:
    """Returns "prompt", the stack of scanned layers a path belongs to (`model/decoder/layers/`), or "rest"."""
    if path.startswith("prompt/"):
        return "prompt"
    head, separator, _ = path.partition("/layers/")
    return head + separator if separator else "rest"
