"""The private names of JAX that the package uses are still there, and stand in one module."""

import inspect
from pathlib import Path

import jax

from promot_jax.distributed import jax_private

ROOT = Path(__file__).parents[2]


def test_no_other_module_uses_private_names() -> None:
    sources = [*(ROOT / "promot_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    assert {path.name for path in sources if "jax._src" in path.read_text("utf-8")} == {"jax_private.py"}


def test_names() -> None:
    from jaxlib import _jax

    assert jax_private.global_state.client is None  # this process has joined no other
    assert not any(env.is_env_present() for env in jax_private.ClusterEnv._cluster_types if not env.opt_in_only_method)
    parameters = list(inspect.signature(jax_private.ClusterEnv.auto_detect_unset_distributed_params).parameters)
    assert parameters == [
        "coordinator_address",
        "num_processes",
        "process_id",
        "local_device_ids",
        "cluster_detection_method",
        "initialization_timeout",
    ]
    for method in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
        assert callable(getattr(_jax.DistributedRuntimeClient, method))
    assert "jax_enable_preemption_service" in jax.config.values
