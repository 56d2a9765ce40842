"""Value-only tuning (arXiv 2602.23197): trains the attention value kernels alone.

Queries and keys decide where attention looks, which in-context learning depends on; values decide what is read there.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=value_only
"""

from promot_jax.methods.base import Method, Stage, all_but


class ValueOnly(Method):
    """One stage: the value kernels of every attention, biases not."""

    name = "value_only"
    label = "value-only tuning"
    stages = (Stage("value_only", trains=("model",), freeze=all_but(r".*attention/value/kernel")),)
