"""LoRA (Hu et al., 2021): low-rank updates beside frozen kernels, as a room of the parameters next to "model".

`params["lora"]` mirrors the model's modules: where the model has `.../query/kernel` `[layers, in, out]`, it has
`.../query/lora_a` `[layers, in, rank]` and `lora_b` `[layers, rank, out]`. `attach` puts these beside the kernels,
where `models.layers.Dense` finds them; `merge` adds their product to the kernels, which leaves a plain model. The model
without either is the plain model, bit for bit.

Why not qwix (0.1.8 was tried): it creates its parameters where a module calls `jax.lax.dot_general` and recognises the
weight there by identity. Our products run inside `layers.matmul`, a `custom_vjp` that spares frozen kernels their
gradient and bfloat16 its slow backward pass; a parameter made in there is a leaked tracer (`UnexpectedTracerError`).
"""

import dataclasses
import re
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
    """Which kernels get a low-rank update, and of what size.

    Attributes:
        rank: of the update; the paper's first stage takes 2 and 4 (its table of other models and methods).
        alpha: the update is `alpha / rank * A @ B`.
        targets: patterns over the paths of kernels, `model/...`; a kernel that any of them matches gets one.
    """

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = (r"model/.*attention/(query|value)/kernel",)

    def __post_init__(self) -> None:
        """Raises UserError for sizes that cannot be."""
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise UserError(f"LoRA needs a rank of at least 1, a positive alpha and targets, not {self}.")

    @property
    def scale(self) -> float:
        """Factor of `A @ B`."""
        return self.alpha / self.rank

    def init(self, key: Array, model: Mapping[str, Any]) -> trees.Tree:
        """Makes `params["lora"]`: A gaussian with variance `1 / in`, B zero, so that nothing changes at first.

        Args:
            key: random key.
            model: `params["model"]`, or its shapes.

        Raises:
            UserError: a pattern that is broken or matches no kernel.
        """
        kernels = {path: leaf for path, leaf in trees.flatten(model, "model").items() if path.endswith("/kernel")}
        chosen = trees.cover([*((target, True) for target in self.targets), (".*", False)], kernels)
        flat: dict[str, Array] = {}
        for index, path in enumerate(path for path, taken in chosen.items() if taken):
            *stack, rows, columns = kernels[path].shape
            module = path.removeprefix("model/").removesuffix("/kernel")
            noise = jax.random.normal(jax.random.fold_in(key, index), (*stack, rows, self.rank))
            flat |= {f"{module}/{A}": noise * rows**-0.5, f"{module}/{B}": jnp.zeros((*stack, self.rank, columns))}
        return trees.unflatten(flat)


def attach(model: Mapping[str, Any], lora: Mapping[str, Any] | None, settings: Lora | None) -> trees.Tree:
    """Returns `params["model"]` with LoRA beside its kernels, B scaled; the model itself where there is none."""
    if not lora:
        return dict(model)
    assert settings is not None
    scaled = {path: leaf * settings.scale if path.endswith(B) else leaf for path, leaf in trees.flatten(lora).items()}
    return trees.merge(model, trees.unflatten(scaled))


def merge(params: Mapping[str, Any], settings: Lora | None) -> trees.Tree:
    """Returns `{"model": ..., "prompt": ...}` with `kernel + scale * A @ B` in the place of the kernels, float32.

    Parameters without a room "lora" come back as they are.
    """
    rest = {room: tree for room, tree in params.items() if room != "lora"}
    if "lora" not in params:
        return rest
    assert settings is not None
    model, lora = trees.flatten(params["model"]), trees.flatten(params["lora"])
    for path in [path for path in lora if path.endswith(A)]:
        module = re.sub(f"{A}$", "", path)
        update = jnp.matmul(lora[path], lora[module + B], precision=jax.lax.Precision.HIGHEST)
        model[module + "kernel"] = model[module + "kernel"].astype(jnp.float32) + settings.scale * update
    return rest | {"model": trees.unflatten(model)}
