"""The search for a layout: meshes, recomputation, weight dtypes and microbatches, the most promising compiled first."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from promot_jax import trees
from promot_jax.errors import UserError
from promot_jax.models.layers import REMAT
from promot_jax.precompile import roofline
from promot_jax.precompile.estimate import Estimate, estimate
from promot_jax.precompile.programs import Programs
from promot_jax.report.markdown import markdown as markdown_table
from promot_jax.training.settings import WEIGHT_DTYPES

Json = dict[str, Any]
MICROBATCHES = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the search varies."""

    data: int
    fsdp: int
    model: int
    remat: str
    weight_dtype: str
    microbatches: int

    @classmethod
    def of(cls, programs: Programs) -> "Layout":
        """The layout that programs have."""
        mesh, training = programs.partitioner.mesh().shape, programs.tuning.model
        remat = str(programs.model().config.remat)
        return cls(mesh["data"], mesh["fsdp"], mesh["model"], remat, training.weight_dtype, training.microbatches)

    def applied(self, programs: Programs) -> Programs:
        """The programs with this layout."""
        assert programs.experiment.model is not None
        mesh: Json = {axis: getattr(self, axis) for axis in ("data", "fsdp", "model")}
        config: Any = dataclasses.replace(programs.experiment.model, remat=self.remat)
        tuned: Json = {"weight_dtype": self.weight_dtype, "microbatches": self.microbatches}
        return dataclasses.replace(
            programs,
            experiment=dataclasses.replace(programs.experiment, model=config),
            tuning=dataclasses.replace(programs.tuning, model=dataclasses.replace(programs.tuning.model, **tuned)),
            partitioner=dataclasses.replace(programs.partitioner, **mesh),
        )

    def gin(self, family: str) -> str:
        """The layout as settings; `family` is the name of the config's class."""
        return (
            f"Partitioner.data = {self.data}\nPartitioner.fsdp = {self.fsdp}\nPartitioner.model = {self.model}\n"
            f'{family}.remat = "{self.remat}"\nmodel/Training.weight_dtype = "{self.weight_dtype}"\n'
            f"model/Training.microbatches = {self.microbatches}\n"
        )

    def mesh(self) -> str:
        """The axes of the mesh that split something, "fsdp 16 x model 4"."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "model": self.model}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"

    def __str__(self) -> str:
        parts = f", {self.microbatches} microbatches" * (self.microbatches > 1)
        return f"{self.mesh()}, remat {self.remat}, {self.weight_dtype} weights{parts}"


def layouts(programs: Programs, program: str) -> dict[Layout, Estimate]:
    """All layouts of a training step that the model's sizes and the batch divide over, each with its estimate."""
    found = {}
    shapes = trees.flatten(programs.params(with_prompt=False)["model"])
    for data, fsdp, model in _meshes(programs, shapes):
        for remat, dtype, parts in itertools.product(REMAT, WEIGHT_DTYPES, MICROBATCHES):
            layout = Layout(data, fsdp, model, remat, dtype, parts)
            if programs.tuning.model.batch_size % (parts * data * fsdp):
                continue
            found[layout] = estimate(layout.applied(programs), program, shapes)
    return found


def _meshes(programs: Programs, shapes: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Sizes of the mesh's axes over which all parameters and all heads divide."""
    count = programs.partitioner.mesh().size
    config: Any = programs.model().config
    for model, data in itertools.product(range(1, count + 1), repeat=2):
        if count % (model * data) or config.num_heads % model:
            continue
        sizes = data, count // (model * data), model
        mesh: Json = dict(zip(("data", "fsdp", "model"), sizes, strict=True))
        try:
            dataclasses.replace(programs.partitioner, **mesh).specs({"model": trees.unflatten(shapes)})
        except UserError:  # a parameter that does not divide, or slices that the mesh does not lie over
            continue
        yield sizes


def search(
    programs: Programs, program: str, trials: int, compiled: Callable[[Programs], Json]
) -> tuple[list[tuple[Layout, Json]], str]:
    """Compiles layouts of a training step, the best by its estimate first, until none that is left can be better.

    Args:
        programs: their own layout is compiled first, whatever its estimate.
        program: a training step.
        trials: how many layouts are compiled at most.
        compiled: compiles a layout's `program` and returns its figures (`measure`).

    Returns:
        The compiled layouts with their figures, the best first; and a sentence on those that were not compiled.

    Raises:
        UserError: no layout fits, or the figures of none pass their checks.
    """
    chip = roofline.CHIPS[programs.topology.partition(":")[0]]
    every = layouts(programs, program)
    fitting = {layout: guess for layout, guess in every.items() if guess.memory <= chip.memory}
    order = sorted(fitting, key=lambda layout: _promise(layout, fitting[layout]))
    given = Layout.of(programs)
    done: dict[Layout, Json] = {given: compiled(programs)}
    for layout in order:
        best = min((_seconds(entry) for entry in done.values()), default=float("inf"))
        if len(done) >= trials:
            break
        if layout not in done and fitting[layout].compute < best:  # else its products alone take longer
            done[layout] = compiled(layout.applied(programs))
    ranked = sorted(done.items(), key=lambda item: (_seconds(item[1]), item[0].weight_dtype != "float32"))
    if _seconds(ranked[0][1]) == float("inf"):
        raise UserError(
            "No layout was found that fits and whose figures pass their checks: take a larger topology, or a smaller "
            "batch."
        )
    sentence = (
        f"{len(every)} layouts divide the model and the batch; {len(every) - len(fitting)} of them do not fit by their "
        f"estimate, {len(done)} were compiled, and the others are no faster by their estimate."
    )
    return ranked, sentence


def _promise(layout: Layout, guess: Estimate) -> tuple[Any, ...]:
    """The smaller, the earlier a layout is compiled: by its estimate to three digits, then by what changes less."""
    return (
        float(f"{guess.seconds:.3g}"),
        float(f"{guess.compute + guess.links:.3g}"),
        layout.weight_dtype != "float32",
        layout.microbatches,
        guess.memory,
    )


def _seconds(entry: Mapping[str, Any]) -> float:
    """The bound of a compiled layout's step; infinite if it does not fit or its figures failed a check."""
    fits = entry["verdict"].startswith("fits")
    return float(entry["step_seconds"]) if fits and "step_seconds" in entry else float("inf")


def table(ranked: Sequence[tuple[Layout, Json]], given: Layout) -> str:
    """Markdown of the compiled layouts, the best first."""
    titles = ["mesh", "remat", "weights", "microbatches", "total", "TFLOP", "HBM traffic", "sent", "step at least"]
    titles += ["bound by", "of the peak", "CPU to compile"]
    rows = [titles]
    for layout, entry in ranked:
        mesh = layout.mesh() + " (as given)" * (layout == given)
        row = [mesh, layout.remat, layout.weight_dtype, str(layout.microbatches)]
        row.append(f"{entry['memory']['total'] / roofline.GIB:.2f}")
        if "step_seconds" in entry:
            sent = sum(entry["collectives"].values()) / 1e9
            row += [f"{entry['flops'] / 1e12:.3g}", f"{entry['bytes'] / 1e9:.3g} GB", f"{sent:.3g} GB"]
            row += [f"{entry['step_seconds']:.3g} s", entry["bound"], f"{100 * entry['utilization']:.0f} %"]
            row.append(f"{entry['compile_cpu_seconds']:.0f} s")
        else:
            row += ["; ".join([entry["verdict"].partition(";")[0], *entry.get("failed_checks", [])])]
        rows.append(row + [""] * (len(titles) - len(row)))
    return markdown_table(rows) + "\n"
