"""Attention-only tuning (arXiv 2510.08564): trains the attention projections alone; MLPs, norms and embeddings stay.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=attention_only
"""

from promot_jax.methods.base import Method, Stage, all_but


class AttentionOnly(Method):
    """One stage: query, key, value and output kernels of every attention, biases not."""

    name = "attention_only"
    label = "attention-only tuning"
    stages = (Stage("attention_only", trains=("model",), freeze=all_but(r".*attention/(query|key|value|out)/kernel")),)
