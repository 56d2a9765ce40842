"""The cells of a comparison, tasks x seeds x methods x learning rates: where each lies and what it runs with."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from promot_jax import stages
from promot_jax.errors import UserError, nearest
from promot_jax.experiment import Experiment
from promot_jax.optim import Optimizer
from promot_jax.stages import Stage
from promot_jax.train import Training
from promot_jax.tuning import Tuning

_WITH_SHOTS = re.compile(r"(?P<method>.+)_(?P<shots>\d+)shot")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        task: the fine-tuning task, without a number of shots.
        seed: of the run.
        method: a key of `stages.METHODS`.
        shots: exemplars in front of every training input (the paper's "+ 1-shot").
        rates: the learning rates that the grid sets, as (field of the settings, rate).
        folder: of the run.
    """

    task: str
    seed: int
    method: str
    shots: int
    rates: tuple[tuple[str, float], ...]
    folder: Path

    @property
    def label(self) -> str:
        """The method as it was asked for: `promot`, `promot_1shot`."""
        return f"{self.method}_{self.shots}shot" if self.shots else self.method

    @property
    def trained_task(self) -> str:
        """The task as it is registered: `rte`, `rte_1shot`."""
        return f"{self.task}_{self.shots}shot" if self.shots else self.task

    def __str__(self) -> str:
        rates = [f"{kind} rate {rate}" for kind, rate in self.rates]
        return ", ".join([self.label, self.task, *rates, f"seed {self.seed}"])


@dataclasses.dataclass(frozen=True)
class Grid:
    """A comparison's settings.

    Attributes:
        workdir: of the comparison.
        experiment: model and data; each cell replaces the task, its lengths and the seeds.
        tuning: settings of the stages, the same for every method; each cell replaces the learning rates.
        methods: keys of `stages.METHODS`, with `_1shot` for one exemplar in front of every training input.
        seeds: each once.
        rates: learning rates by field of `tuning`: "prompt" and "model" for the two kinds of stage, "lora_optimizer"
            for LoRA's own, and "joint_prompt" where joint tuning has an optimizer for its prompt; a field that is not
            named keeps its one rate.
        tasks: fine-tuning tasks, each with its `feature_lengths`; none for the experiment's own.
        report: folder in `workdir` for results and report, "" for `workdir` itself: comparisons of other methods or
            seeds over the same cells each have their own.
    """

    workdir: Path
    experiment: Experiment
    tuning: Tuning
    methods: Sequence[str]
    seeds: Sequence[int]
    rates: Mapping[str, Sequence[float]]
    tasks: Mapping[str, Mapping[str, int]]
    report: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a grid that cannot be run."""
        for method in self.methods:
            stages.method(_parse(method)[0])
        kinds = [field.name for field in dataclasses.fields(self.tuning) if _optimizer(self.tuning, field.name)]
        for kind, rates in self.rates.items():
            if kind not in kinds:
                raise UserError(f"Unknown kind of stage {kind!r} in the learning rates{nearest(kind, kinds)}.")
            if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in rates):
                raise UserError(f"Learning rates are positive numbers, not {list(rates)}.")
        axes = {"method": self.methods, "seed": self.seeds, **{f"{kind} rate": v for kind, v in self.rates.items()}}
        for name, values in axes.items():
            if len(set(values)) < len(values) or not values:
                raise UserError(f"A comparison needs at least one {name}, and each only once, not {list(values)}.")
        if min(self.seeds) < 0:
            raise UserError(f"Seeds are not negative: {list(self.seeds)}.")
        for task in self.tasks:
            _check_folder("A name in TASKS", task)
        if self.report:
            _check_folder("REPORT", self.report, self.tasks)

    def cells_folder(self, task: str) -> Path:
        """Where a task's cells lie."""
        return self.workdir / (task if self.tasks else "")

    def report_folder(self, task: str) -> Path:
        """Where a task's results and report lie: a folder of its own where tasks are named."""
        return self.workdir / self.report / (task if self.tasks else "")

    def cells(self) -> Iterator[Cell]:
        """Yields all cells in the order they are run in: a seed of all methods before the next one."""
        for task, seed, label in itertools.product(self.tasks or [self.experiment.task], self.seeds, self.methods):
            method, shots = _parse(label)
            for rates in itertools.product(*self._rates_of(method)):
                names = [f"lr_{rate}" if kind == "model" else f"{kind}_lr_{rate}" for kind, rate in rates]
                parts = [task] * bool(self.tasks) + [label] + ["_".join(names)] * bool(names) + [f"seed_{seed}"]
                yield Cell(task, seed, method, shots, rates, self.workdir.joinpath(*parts))

    def _rates_of(self, method: str) -> list[list[tuple[str, float]]]:
        """(kind, rate) of the kinds of stage that a method has: of those whose rate makes a difference to it."""
        plan, found = stages.method(method), []
        for kind, rates in self.rates.items():
            optimizer = _optimizer(self.tuning, kind)
            assert optimizer is not None  # checked above
            changed = with_rates(self.tuning, {kind: 2 * optimizer.learning_rate + 1})
            if any(changed.of(stage) != self.tuning.of(stage) for stage in plan):
                found.append([(kind, float(rate)) for rate in rates])
        return found

    def experiment_of(self, cell: Cell) -> Experiment:
        """The experiment of a cell: its task with room for its exemplars, its seed, for the evaluation's too."""
        lengths = self.tasks.get(cell.task) or self.experiment.feature_lengths
        return dataclasses.replace(
            self.experiment,
            task=cell.trained_task,
            feature_lengths={**lengths, "inputs": lengths.get("inputs", 0) * (1 + cell.shots)},
            seed=cell.seed,
            evaluation=dataclasses.replace(self.experiment.evaluation, exemplar_seed=cell.seed),
        )

    def tuning_of(self, cell: Cell) -> Tuning:
        """The settings of a cell's stages."""
        return with_rates(self.tuning, dict(cell.rates))

    def first_stage(self, cell: Cell) -> tuple[Any, ...] | None:
        """What decides the outcome of a cell's first stage, equal for cells that can share it; None without stages."""
        plan: tuple[Stage, ...] = stages.method(cell.method)
        return (cell.trained_task, cell.seed, plan[0], self.tuning_of(cell).of(plan[0])) if plan else None


def with_rates(tuning: Tuning, rates: Mapping[str, float]) -> Tuning:
    """The settings with other learning rates, by field: one that says how a stage trains, or an optimizer."""
    changed: dict[str, Any] = {}
    for kind, rate in rates.items():
        settings, optimizer = getattr(tuning, kind), _optimizer(tuning, kind)
        assert optimizer is not None
        other = dataclasses.replace(optimizer, learning_rate=rate)
        changed[kind] = other if settings is optimizer else dataclasses.replace(settings, optimizer=other)
    return dataclasses.replace(tuning, **changed)


def _optimizer(tuning: Tuning, kind: str) -> Optimizer | None:
    """The optimizer of a field of the settings, None where it has none."""
    settings = getattr(tuning, kind)
    found = settings.optimizer if isinstance(settings, Training) else settings
    return found if isinstance(found, Optimizer) else None


def _check_folder(what: str, name: str, others: Iterable[str] = ()) -> None:
    """Raises UserError for a folder outside the comparison's, or one in it that is or may become another one's."""
    first, *rest = PurePath(name).parts or ("",)
    if not first or ".." in (first, *rest) or PurePath(name).is_absolute():
        raise UserError(f"{what} becomes a folder in the comparison's own, which {name!r} cannot be.")
    if first in others or _parse(first)[0] in stages.METHODS:
        raise UserError(f"{what} becomes a folder, and that of {name!r} is for the cells of {first!r}: choose another.")


def _parse(label: str) -> tuple[str, int]:
    """Method and number of exemplars in front of its training inputs."""
    match = _WITH_SHOTS.fullmatch(label)
    return (match["method"], int(match["shots"])) if match and label not in stages.METHODS else (label, 0)
