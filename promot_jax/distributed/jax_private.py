"""The names that this package uses of JAX without a public name; `test_jax_private.py` fails when they move.

`global_state.client` is the client of JAX's coordination service. `ClusterEnv` tells who the hosts of a cluster are;
the public `jax.distributed.initialize` would join them at once.
"""

from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state

__all__ = ["ClusterEnv", "global_state"]
