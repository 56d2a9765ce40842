"""The devices of TPU slices that need not exist: XLA:TPU comes with `libtpu` and compiles for any topology."""

import importlib.util
import os
from typing import Any

import jax

from promot_jax.errors import UserError
from promot_jax.precompile import roofline


def topology_devices(topology: str, slices: int = 1) -> tuple[Any, ...]:
    """The devices of TPU slices that need not exist.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    if topology.partition(":")[0] not in roofline.CHIPS:
        raise UserError(f"Unknown topology {topology!r}: write one like v4:4x4x4; chips: {', '.join(roofline.CHIPS)}.")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for TPUs needs the package libtpu: pip install 'promot_jax[precompile]'.")
    import libtpu
    from jax.experimental import topologies

    # The compiler alone: no chip is looked for, here or at a metadata server.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_LIBRARY_PATH=libtpu.get_library_path(),
        TPU_ACCELERATOR_TYPE="v4-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several such runs may go on side by side
    )
    try:
        options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if topology.startswith("v4:"):  # its two cores work as one device, as where JAX runs on such chips
            options["chip_config_name"] = "megacore"
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # of whatever type this jaxlib chooses
        raise UserError(f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}.") from error
    return tuple(description.devices)
