"""Mesh and shardings, from two tables: parameter path to logical axes, logical axis to mesh axis."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from promot_jax import trees
from promot_jax.errors import UserError

AXES = ("data", "fsdp", "model")

# First match wins. Leaves of scanned stacks carry "layers" in front.
PATH_TO_LOGICAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"prompt/.*", ("prompt", "prompt_embed")),
    (r"model/token_embedder/embedding", ("vocab", "embed")),
    (r"model/.*/layers/.*attention/(query|key|value)/kernel", ("layers", "embed", "joined_kv")),
    (r"model/.*/layers/.*attention/(query|key|value)/bias", ("layers", "joined_kv")),
    (r"model/.*/layers/.*attention/out/kernel", ("layers", "joined_kv", "embed")),
    (r"model/.*/layers/mlp/wi.*/kernel", ("layers", "embed", "mlp")),
    (r"model/.*/layers/mlp/wo/kernel", ("layers", "mlp", "embed")),
    (r"model/.*/relpos_bias/rel_embedding", ("heads", "buckets")),
    (r"model/.*/layers/.*/scale", ("layers", "norm")),
    (r"model/.*norm/scale", ("norm",)),
    (r"model/.*logits_dense/kernel", ("embed", "vocab")),
)

# Prompts, norms and relative position biases are replicated: a logical axis that is not named here is not split.
LOGICAL_TO_MESH: tuple[tuple[str, str], ...] = (
    ("batch", "data"),
    ("vocab", "model"),
    ("joined_kv", "model"),
    ("mlp", "model"),
    ("embed", "fsdp"),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Places parameters and batches on a mesh.

    Attributes:
        data: ways the batch is split; -1 takes the devices that are left.
        fsdp: ways parameters are split along `embed`; the batch is split that way too.
        model: ways heads, MLP and vocabulary are split.
        path_rules: rows in front of `PATH_TO_LOGICAL`.
        axis_rules: rows in front of `LOGICAL_TO_MESH`.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    path_rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    axis_rules: tuple[tuple[str, str], ...] = ()

    def mesh(self) -> Mesh:
        """Returns the mesh over all devices.

        Raises:
            UserError: the sizes do not multiply to the number of devices.
        """
        return _mesh((self.data, self.fsdp, self.model))

    def specs(self, params: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """Returns `{path: PartitionSpec}` of a parameter tree, checked against its shapes.

        Raises:
            UserError: a path without a row, a row of the wrong rank, or a dimension that does not divide.
        """
        flat = trees.flatten(params)
        rules = [*self.path_rules, *PATH_TO_LOGICAL]
        # Rows for other models may match nothing, so each path is looked up alone.
        to_mesh: dict[str, str] = {}
        for logical, mesh_axis in (*self.axis_rules, *LOGICAL_TO_MESH):
            to_mesh.setdefault(logical, mesh_axis)
        sizes = dict(self.mesh().shape)
        specs = {}
        for path, leaf in flat.items():
            axes = trees.lookup(rules, path)
            if len(axes) != len(leaf.shape):
                raise UserError(f"{path} has shape {tuple(leaf.shape)}, but its row names the axes {axes}.")
            names = [to_mesh.get(axis) for axis in axes]
            for axis, name, size in zip(axes, names, leaf.shape, strict=True):
                if name and (name not in sizes or names.count(name) > 1):
                    raise UserError(f"{path}: {axis} cannot lie on mesh axis {name!r}; use each of {AXES} once.")
                if name and size % sizes[name]:
                    raise UserError(
                        f"{path}: {axis} of size {size} does not divide over mesh axis {name!r} of {sizes[name]}."
                    )
            specs[path] = PartitionSpec(*names)
        return specs

    def place(self, params: Mapping[str, Any]) -> trees.Tree:
        """Puts a parameter tree on the mesh."""
        mesh, specs = self.mesh(), self.specs(params)
        return trees.unflatten(
            {
                path: jax.device_put(leaf, NamedSharding(mesh, specs[path]))
                for path, leaf in trees.flatten(params).items()
            }
        )

    def like(self, state: Any, params: Mapping[str, Any]) -> Any:
        """Shardings of an optimizer state: leaves of a parameter's path and shape like it, others replicated."""
        mesh, specs, flat = self.mesh(), self.specs(params), trees.flatten(params)

        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            for start in range(len(keys)):
                name = "/".join(keys[start:])
                if name in flat and flat[name].shape == leaf.shape:
                    return NamedSharding(mesh, specs[name])
            return self.replicated()

        return jax.tree_util.tree_map_with_path(sharding, state)

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts a batch on the mesh, rows split over `data` and `fsdp`.

        Raises:
            UserError: the rows do not divide.
        """
        mesh = self.mesh()
        ways = self.rows(mesh)
        for array in batch.values():
            if array.shape[0] % ways:
                raise UserError(
                    f"A batch of {len(array)} rows does not divide over {ways} data shards; change BATCH_SIZE."
                )
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return {name: jax.device_put(array, sharding) for name, array in batch.items()}

    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh(), PartitionSpec())

    def rows(self, mesh: Mesh | None = None) -> int:
        """Ways a batch is split."""
        shape = (mesh or self.mesh()).shape
        return int(shape["data"] * shape["fsdp"])


@functools.lru_cache
def _mesh(wanted: tuple[int, ...]) -> Mesh:
    sizes, devices = list(wanted), jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if -1 in sizes or math.prod(sizes) != devices:
        named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
        raise UserError(f"A mesh of {named} does not fit the {devices} devices at hand; change Partitioner's sizes.")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
