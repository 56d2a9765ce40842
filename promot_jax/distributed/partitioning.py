"""Mesh and shardings, from two tables: parameter path -> logical axes, logical axis -> mesh axes.

The second table also shards activations: models name their logical axes with `constrain`, which does nothing outside
`activations` and on a single device.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from promot_jax import trees
from promot_jax.errors import UserError, nearest

AXES = ("data", "fsdp", "model")
MeshAxes = str | Sequence[str] | None

# The first match wins. Leaves of scanned stacks have "layers" as first axis.
PATH_TO_LOGICAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"prompt/.*", ("prompt", "prompt_embed")),
    (r"lora/.*/layers/.*", ("layers", "lora", "lora")),
    (r"lora/.*", ("lora", "lora")),
    (r"model/token_embedder/embedding", ("vocab", "embed")),
    (r"model/.*/layers/.*attention/(query|key|value)/kernel", ("layers", "embed", "joined_kv")),
    (r"model/.*/layers/.*attention/(query|key|value)/bias", ("layers", "joined_kv")),
    (r"model/.*/layers/.*attention/out/kernel", ("layers", "joined_kv", "embed")),
    (r"model/.*/layers/mlp/wi.*/kernel", ("layers", "embed", "mlp")),
    (r"model/.*/layers/mlp/wo/kernel", ("layers", "mlp", "embed")),
    (r"model/.*/relpos_bias/rel_embedding", ("relpos_heads", "buckets")),
    (r"model/.*/layers/.*/scale", ("layers", "norm")),
    (r"model/.*norm/scale", ("norm",)),
    (r"model/.*logits_dense/kernel", ("embed", "vocab")),
)

# A logical axis without a row is not split: prompts, LoRA, norms and relative position biases are replicated.
LOGICAL_TO_MESH: tuple[tuple[str, MeshAxes], ...] = (
    ("batch", ("data", "fsdp")),
    ("looked_up", "data"),
    ("vocab", "model"),
    ("joined_kv", "model"),
    ("mlp", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("kv_heads", "model"),
)

# Logical axes that only activations have (`constrain`); a user's `axis_rules` may split them. `looked_up` is the batch
# during the embedding lookup, where each device reads its part of `embed`: a mesh axis that splits `embed` must not
# split the batch before the two are exchanged.
ACTIVATION_AXES = ("batch", "looked_up", "length", "heads", "kv_heads", "activation_embed")

_SUBTREES = ("model", "prompt", "lora")  # first keys of parameter trees; a tree may have some of them only


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Places parameters and batches on a mesh."""

    data: int = -1  # parts of the batch; -1 uses the remaining devices
    fsdp: int = 1  # parts of parameters along `embed`; it splits the batch too
    model: int = 1  # parts of heads, MLP and vocabulary
    # Groups of devices with a slower network between them (TPU slices over DCN, hosts of GPUs). 0 uses the slices that
    # the devices report; if they report none, a number makes every process a slice.
    slices: int = 0
    slice_axis: str = "data"  # the mesh axis that spans the slices, or "fsdp"; the other axes stay within a slice
    path_rules: tuple[tuple[str, tuple[str, ...]], ...] = ()  # before `PATH_TO_LOGICAL`; each must match a parameter
    axis_rules: tuple[tuple[str, MeshAxes], ...] = ()  # before `LOGICAL_TO_MESH`: to one mesh axis, several, or None
    devices: tuple[Any, ...] = ()  # empty for all of this run; those of a topology need not exist (`precompile`)

    def __post_init__(self) -> None:
        """Turns lists, which gin may give, into tuples; raises UserError for a malformed row or value."""
        for name in ("path_rules", "axis_rules"):
            rows = tuple(_frozen(row) for row in getattr(self, name))
            if not all(isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) for row in rows):
                raise UserError(f"Partitioner.{name} is {rows}; each row is a pair: a name, and what it stands for.")
            object.__setattr__(self, name, rows)
        if self.slice_axis not in ("data", "fsdp") or self.slices < 0:
            raise UserError(
                f"Partitioner.slices is not negative, and slice_axis 'data' or 'fsdp', not {self.slices} and "
                f"{self.slice_axis!r}."
            )

    def mesh(self) -> Mesh:
        """Returns the mesh over all devices.

        Raises:
            UserError: the sizes do not multiply to the number of devices, or not to the slices.
        """
        devices = self.devices or tuple(jax.devices())
        return _mesh((self.data, self.fsdp, self.model), devices, self.slices, self.slice_axis)

    def table(self) -> dict[str, tuple[str, ...]]:
        """Returns the mesh axes of every logical axis, () if it is not split.

        Raises:
            UserError: a row names an unknown logical axis or mesh axis.
        """
        known = {axis for _, axes in (*self.path_rules, *PATH_TO_LOGICAL) for axis in axes} | {*ACTIVATION_AXES}
        for logical, names in self.axis_rules:
            if logical not in known:
                raise UserError(f"Partitioner.axis_rules: nothing has the axis {logical!r}{nearest(logical, known)}.")
            if unknown := set(_as_tuple(names)) - set(AXES):
                raise UserError(f"{logical} cannot lie on mesh axis {min(unknown)!r}; the axes are {AXES}.")
        return {logical: _as_tuple(names) for logical, names in (*LOGICAL_TO_MESH, *reversed(self.axis_rules))}

    def specs(self, params: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """Returns `{path: PartitionSpec}` of a parameter tree, checked against its shapes.

        Raises:
            UserError: a path without a row, a row of the wrong rank, a dimension that does not divide, or a row of
                `path_rules` that matches nothing.
        """
        flat = trees.flatten(params)
        for pattern, _ in self.path_rules:
            subtree = pattern.partition("/")[0]
            expected = subtree in params or (subtree not in _SUBTREES and "model" in params)
            if expected and not any(trees.matches(pattern, path) for path in flat):
                raise UserError(
                    f"Partitioner.path_rules: the pattern {pattern!r} matches no parameter{nearest(pattern, flat)}."
                )
        return self._specs(flat)

    def _specs(self, flat: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        # Not `trees.cover`: rows for other models match nothing.
        rules, table, sizes = [*self.path_rules, *PATH_TO_LOGICAL], self.table(), self.mesh().shape
        specs = {}
        for path, leaf in flat.items():
            axes = trees.lookup(rules, path)
            if len(axes) != len(leaf.shape):
                raise UserError(f"{path} has shape {tuple(leaf.shape)}, but its row names the axes {axes}.")
            entries = [table.get(axis, ()) for axis in axes]
            used = [name for names in entries for name in names]
            for axis, names, size in zip(axes, entries, leaf.shape, strict=True):
                if twice := [name for name in names if used.count(name) > 1]:
                    raise UserError(f"{path}: {axis} cannot lie on mesh axis {twice[0]!r}; use each of {AXES} once.")
                if size % (ways := math.prod(sizes[name] for name in names)):
                    raise UserError(
                        f"{path}: {axis} of size {size} does not divide over mesh axis "
                        f"{' x '.join(map(repr, names))} of {ways}."
                    )
            specs[path] = PartitionSpec(*entries)
        return specs

    def place(self, params: Mapping[str, Any]) -> trees.Tree:
        """Puts a parameter tree on the mesh."""
        mesh, specs, flat = self.mesh(), self.specs(params), trees.flatten(params)
        return trees.unflatten({path: _put(leaf, NamedSharding(mesh, specs[path])) for path, leaf in flat.items()})

    def like(self, state: Any, params: Mapping[str, Any]) -> Any:
        """Returns the shardings of an optimizer state: leaves under a parameter's path like it, others replicated.

        A factored moment of Adafactor lacks one axis of its parameter: `v_col` the second largest, `v_row` the largest.
        """
        mesh, flat = self.mesh(), trees.flatten(params)
        specs = self._specs(flat)

        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            for start in range(len(keys)):
                name = "/".join(keys[start:])
                if name in flat:
                    spec = _without(specs[name], flat[name].shape, leaf.shape, first="v_col" in fields)
                    return NamedSharding(mesh, spec)
            return self.replicated()

        return jax.tree_util.tree_map_with_path(sharding, state)

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts a batch on the mesh, its rows split over `data` and `fsdp`.

        Args:
            batch: arrays of all rows; only the rows for devices of this host are read.

        Raises:
            UserError: the rows do not divide.
        """
        for array in batch.values():
            if len(array) % self.rows():
                raise UserError(
                    f"A batch of {len(array)} rows does not divide over {self.rows()} data shards; change BATCH_SIZE."
                )
        return {name: _put(array, self.row_sharding()) for name, array in batch.items()}

    def row_sharding(self) -> NamedSharding:
        """Returns the sharding of a batch: rows are split, other axes are not."""
        return NamedSharding(self.mesh(), PartitionSpec(self.table()["batch"]))

    def held_rows(self, rows: int) -> np.ndarray:
        """Returns which rows of a batch lie on devices of this host: bool `[rows]`."""
        local = np.zeros(rows, bool)
        for part in self.row_sharding().addressable_devices_indices_map((rows,)).values():
            local[part] = True
        return local

    def replicated(self) -> NamedSharding:
        """Returns the sharding of an array that is whole on every device."""
        return NamedSharding(self.mesh(), PartitionSpec())

    def rows(self) -> int:
        """Returns the number of parts into which a batch is split."""
        return math.prod(self.mesh().shape[name] for name in self.table()["batch"])


_ACTIVE: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar("partitioner", default=None)


@contextlib.contextmanager
def activations(partitioner: Partitioner | None) -> Iterator[None]:
    """Makes `constrain` use a partitioner in code traced inside; None leaves activations to the compiler."""
    token = _ACTIVE.set(partitioner)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Partitioner | None:
    """Returns the partitioner whose mesh the code that is being traced runs on (`activations`), None without one."""
    return _ACTIVE.get()


def device_of(partitioner: Partitioner | None) -> Any:
    """Returns the first device of a partitioner's mesh; without a partitioner, of this run."""
    return jax.devices()[0] if partitioner is None else partitioner.mesh().devices.flat[0]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation by its logical axes; None is an axis that is not split.

    A mesh axis splits only the first logical axis that names it. An axis that does not divide (for instance a single
    key/value head) is left to the compiler.
    """
    partitioner = _ACTIVE.get()
    if partitioner is None or (mesh := partitioner.mesh()).size == 1:
        return x
    table = partitioner.table()
    entries: list[Any] = []
    used: set[str] = set()
    for axis, size in zip(axes, x.shape, strict=True):
        names = tuple(name for name in table.get(axis or "", ()) if name not in used)
        if size % math.prod(mesh.shape[name] for name in names):
            entries.append(PartitionSpec.UNCONSTRAINED)
        else:
            entries.append(names)
            used |= {*names}
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))


def _as_tuple(names: MeshAxes) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _without(spec: PartitionSpec, whole: tuple[int, ...], part: tuple[int, ...], *, first: bool) -> PartitionSpec:
    """Returns the spec of a shape `part`: `spec` if it is `whole`, without an axis if `part` lacks it, else replicated.

    If several axes may be the missing one, it is the first or the last.
    """
    if part == whole:
        return spec
    missing = [axis for axis in range(len(whole)) if whole[:axis] + whole[axis + 1 :] == part]
    if not missing:
        return PartitionSpec()
    axis = missing[0 if first else -1]
    return PartitionSpec(*spec[:axis], *spec[axis + 1 :])


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts a leaf, from this host or already on the mesh, where its sharding says."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    leaf = np.asarray(leaf)  # on all hosts: each takes its parts; device_put would first compare it over hosts
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)


@functools.lru_cache
def _mesh(requested: tuple[int, ...], devices: tuple[Any, ...], slices: int, slice_axis: str) -> Mesh:
    sizes = list(requested)
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, requested, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        raise UserError(
            f"A mesh of {named} does not fit the {len(devices)} devices at hand; change Partitioner's sizes."
        )
    groups = {getattr(device, "slice_index", None) for device in devices}
    by_process = len(groups) == 1 and slices > 1
    count = len({device.process_index for device in devices}) if by_process else len(groups)
    if slices not in (0, count) or sizes[AXES.index(slice_axis)] % count:
        raise UserError(
            f"A mesh of {named} does not lie over {count} slices by its axis {slice_axis!r}: make {slice_axis} a "
            f"multiple of {count} (meshes/slices.gin does), or choose another Partitioner.slice_axis; "
            f"Partitioner.slices is {slices}."
        )
    # If a topology lists the cores of a chip one by one, they become neighbours on the last axis that they divide.
    cores = sorted({getattr(device, "core_on_chip", 0) for device in devices})
    paired = max((axis for axis, size in enumerate(sizes) if size % len(cores) == 0), default=0)
    chips = [device for device in devices if getattr(device, "core_on_chip", 0) == cores[0]]
    outer = [count if axis == slice_axis else 1 for axis in AXES]
    inner = [size // ways for size, ways in zip(sizes, outer, strict=True)]
    inner[paired] //= len(cores)
    if count == 1:
        grid = mesh_utils.create_device_mesh(inner, chips, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, chips, process_is_granule=by_process, allow_split_physical_axes=True
        )
    if len(cores) > 1:
        at = {(getattr(device, "slice_index", 0), *device.coords, device.core_on_chip): device for device in devices}
        whole = [
            np.vectorize(lambda chip, core=core: at[getattr(chip, "slice_index", 0), *chip.coords, core])(grid)
            for core in cores
        ]
        grid = np.stack(whole, axis=paired + 1).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
