"""What all families share: a Linen module as pure functions of a plain dict, on the mesh that it is built for."""

from typing import Any

import flax.linen as nn
import jax

from promot_jax.distributed.partitioning import Partitioner, activations

Array = jax.Array
Params = dict[str, Any]


class Family:
    """The part of `promot_jax.models.Model` that asks for nothing of one family.

    Attributes:
        partitioner: where activations lie, None on one device.
    """

    partitioner: Partitioner | None

    @property
    def module(self) -> nn.Module:
        """The Linen module."""
        raise NotImplementedError

    def hidden(self, params: Params, prompt: Array | None, batch: Params, dropout_key: Array | None = None) -> Array:
        """States that predict the targets, `[batch, targets, embed]`; see `Model.hidden`."""
        raise NotImplementedError

    def head(self, params: Params, hidden: Array) -> Array:
        """Logits `[..., vocab]`, float32, of states `[..., embed]`."""
        logits: Array = self._apply(params, "head", hidden)
        return logits

    def _apply(self, params: Params, method: str, *args: Any, **rngs: Any) -> Any:
        with activations(self.partitioner):
            return self.module.apply({"params": params}, *args, method=method, rngs=rngs)
