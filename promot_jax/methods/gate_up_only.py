"""Gate-and-up-only tuning (arXiv 2510.08564): trains the MLP kernels that read, not those that write.

The down projection, which writes into the residual stream, stays with attention, norms and embeddings as it was.

Command: python -m promot_jax.main --gin_file=method.gin --gin.METHOD=gate_up_only
"""

from promot_jax.methods.base import Method, Stage, all_but


class GateUpOnly(Method):
    """One stage: gate and up kernels of every MLP, biases not."""

    name = "gate_up_only"
    label = "gate-and-up-only tuning"
    stages = (Stage("gate_up_only", trains=("model",), freeze=all_but(r".*mlp/wi(_[01])?/kernel")),)
