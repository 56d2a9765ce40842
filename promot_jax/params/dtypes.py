"""The dtype in which weights are stored."""

from typing import Any

from promot_jax import trees


def cast_weights(params: Any, dtype: str) -> Any:
    """Returns parameters with kernels and embeddings in the dtype of their products, the rest unchanged.

    The products are the same: they cast their weights to that dtype anyway.
    """
    flat = trees.flatten(params)
    names = ("/kernel", "/embedding")  # not T5's rel_embedding, which is added
    return trees.unflatten({path: leaf.astype(dtype) if path.endswith(names) else leaf for path, leaf in flat.items()})
