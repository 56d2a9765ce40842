"""LoRA (Hu et al., 2021): low-rank updates of frozen kernels, in the parameter subtree `params["lora"]`.

The subtree mirrors the model's modules: for the model's `.../query/kernel` `[layers, in, out]` it has
`.../query/lora_a` `[layers, in, rank]` and `lora_b` `[layers, rank, out]`. `attach` puts these beside the kernels,
where `models.layers.Dense` reads them; `merge` adds their product to the kernels, which gives a plain model. The model
without LoRA is the plain model, bitwise.

qwix 0.1.8 does not fit: it creates its parameters where a module calls `jax.lax.dot_general` and recognises the weight
there by identity. Our products run inside `layers.matmul`, a `custom_vjp` that skips the gradient of frozen kernels and
the slow backward pass of bfloat16; a parameter created in there is a leaked tracer (`UnexpectedTracerError`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from promot_jax import trees
from promot_jax.errors import UserError

Array = jax.Array
A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of LoRA: which kernels get a low-rank update, and its size."""

    rank: int = 4  # of the update; the paper's first stage uses 2 and 4 (its table of other models and methods)
    alpha: float = 8.0  # the update is `alpha / rank * A @ B`
    # Patterns over the paths of kernels, `model/...`; a kernel that any of them matches gets an update.
    targets: tuple[str, ...] = (r"model/.*attention/(query|value)/kernel",)

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise UserError(f"LoRA needs a rank of at least 1, a positive alpha and targets, not {self}.")

    @property
    def scale(self) -> float:
        """Factor of `A @ B`."""
        return self.alpha / self.rank

    def init(self, key: Array, model: Mapping[str, Any]) -> trees.Tree:
        """Returns a fresh `params["lora"]`: A is gaussian with variance `1 / in`, B is zero, so the update is zero.

        Args:
            key: random key.
            model: `params["model"]`, or its shapes.

        Raises:
            UserError: a pattern is not a regular expression, or matches no kernel.
        """
        kernels = {path: leaf for path, leaf in trees.flatten(model, "model").items() if path.endswith("/kernel")}
        chosen = trees.cover([*((target, True) for target in self.targets), (".*", False)], kernels)
        flat: dict[str, Array] = {}
        for index, path in enumerate(path for path, target in chosen.items() if target):
            *stack, rows, columns = kernels[path].shape
            module = path.removeprefix("model/").removesuffix("/kernel")
            noise = jax.random.normal(jax.random.fold_in(key, index), (*stack, rows, self.rank))
            flat |= {f"{module}/{A}": noise * rows**-0.5, f"{module}/{B}": jnp.zeros((*stack, self.rank, columns))}
        return trees.unflatten(flat)


def attach(model: Mapping[str, Any], lora: Mapping[str, Any] | None, settings: Lora | None) -> trees.Tree:
    """Returns `params["model"]` with LoRA beside its kernels, B scaled; the model itself if `lora` is empty."""
    if not lora:
        return dict(model)
    assert settings is not None
    scaled = {path: leaf * settings.scale if path.endswith(B) else leaf for path, leaf in trees.flatten(lora).items()}
    return trees.merge(model, trees.unflatten(scaled))


def merge(params: Mapping[str, Any], settings: Lora | None) -> trees.Tree:
    """Returns the parameters without "lora", its kernels replaced by `kernel + scale * A @ B`, float32."""
    rest = {name: tree for name, tree in params.items() if name != "lora"}
    if "lora" not in params:
        return rest
    assert settings is not None
    model, lora = trees.flatten(params["model"]), trees.flatten(params["lora"])
    for module in [path.removesuffix(A) for path in lora if path.endswith(A)]:
        update = jnp.matmul(lora[module + A], lora[module + B], precision=jax.lax.Precision.HIGHEST)
        model[module + "kernel"] = model[module + "kernel"].astype(jnp.float32) + settings.scale * update
    return rest | {"model": trees.unflatten(model)}
