"""The dtype that weights are held in."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from promot_jax import trees

if TYPE_CHECKING:
    pass


def cast_weights(params: Any, dtype: str) -> Any:
    """Kernels and embeddings in the dtype they are multiplied in, which changes no product; the rest stays float32."""
    flat = trees.flatten(params)
    names = ("/kernel", "/embedding")  # not T5's rel_embedding, which is added
    return trees.unflatten(
        {path: leaf.astype(jnp.dtype(dtype)) if path.endswith(names) else leaf for path, leaf in flat.items()}
    )
