"""The cells of a comparison, tasks x seeds x methods x settings: where each lies and what it runs with."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from promot_jax import methods
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.settings import Experiment
from promot_jax.training.settings import Tuning

# What is varied had other names once: as a key of LEARNING_RATES and STRENGTHS, and in the names of folders.
RENAMED = {
    "model": "learning_rate",
    "prompt": "prompt_learning_rate",
    "lora_optimizer": "lora_learning_rate",
    "joint_prompt": "joint_prompt_learning_rate",
    "l2sp": "l2sp_weight",
    "kl": "kl_weight",
}
_OLD_FOLDERS = {new: "lr" if old == "model" else f"{old}_lr" for old, new in RENAMED.items() if "rate" in new}
_OLD_FOLDERS |= {new: old for old, new in RENAMED.items() if "rate" not in new}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    task: str  # the fine-tuning task, without a number of shots
    seed: int
    method: str  # `methods.METHODS`
    shots: int  # exemplars in front of every training input (the paper's "+ 1-shot")
    varied: tuple[tuple[str, float], ...]  # what the grid sets of the settings, by name in `Tuning.variable`
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
        varied = [f"{name} {value}" for name, value in self.varied]
        return ", ".join([self.label, self.task, *varied, f"seed {self.seed}"])


@dataclasses.dataclass(frozen=True)
class Grid:
    """A comparison's settings, which `jobs.compare` explains."""

    workdir: Path
    experiment: Experiment  # each cell replaces the task, its lengths and the seeds
    tuning: Tuning  # each cell replaces what is varied
    methods: Sequence[str]
    seeds: Sequence[int]
    varied: Mapping[str, Sequence[float]]  # by name in `Tuning.variable`; what is not named keeps its one value
    tasks: Mapping[str, Mapping[str, int]]  # `feature_lengths` of each; none for the experiment's own task
    report: str = ""
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for a grid that cannot be run."""
        for method in self.methods:
            methods.find(methods.parse(method)[0])
        known = self.tuning.variable()
        for name, tried in self.varied.items():
            if name not in known:
                raise UserError(f"No setting {name!r} can be varied{nearest(name, known)}.")
            kind = int if known[name] is int else int | float
            if not all(isinstance(value, kind) and 0 < value < math.inf for value in tried):
                expected = "positive whole numbers" if kind is int else "positive numbers"
                raise UserError(f"Values to try of {name!r} are {expected}, not {list(tried)}.")
        axes = {"method": self.methods, "seed": self.seeds, **{f"value of {k!r}": v for k, v in self.varied.items()}}
        for name, values in axes.items():
            if len(set(values)) < len(values) or not values:
                raise UserError(f"A comparison needs at least one {name}, and each only once, not {list(values)}.")
        if not self.margin >= 0:
            raise UserError(f"MARGIN is not negative: {self.margin}.")
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
            method, shots = methods.parse(label)
            for varied in itertools.product(*self._varied_of(method)):
                folder, last = self.cells_folder(task) / label, f"seed_{seed}"
                path, earlier = (folder / _named(varied, names) / last for names in ({}, _OLD_FOLDERS))
                if earlier.is_dir() and not path.is_dir():
                    path = earlier
                yield Cell(task, seed, method, shots, varied, path)

    def _varied_of(self, method: str) -> list[list[tuple[str, float]]]:
        """(name, value) of what is varied of a method: of what makes a difference to its stages."""
        kinds, varied = self.tuning.variable(), []
        firsts = {name: values[0] for name, values in self.varied.items()}
        for name, values in self.varied.items():
            one, other = (_plan(self.tuning.varied(firsts | {name: value}), method) for value in (1, 2))
            if one != other:
                varied.append([(name, kinds[name](value)) for value in values])
        return varied

    def experiment_of(self, cell: Cell) -> Experiment:
        """The experiment of a cell: its task with room for its exemplars, its seed, for the evaluation's too."""
        experiment = dataclasses.replace(
            self.experiment,
            task=cell.task,
            feature_lengths=self.tasks.get(cell.task) or self.experiment.feature_lengths,
            seed=cell.seed,
            evaluation=dataclasses.replace(self.experiment.evaluation, exemplar_seed=cell.seed),
        )
        return experiment.with_shots(cell.shots)

    def tuning_of(self, cell: Cell) -> Tuning:
        """The settings of a cell's stages."""
        return self.tuning.varied(dict(cell.varied))

    def first_stage(self, cell: Cell) -> tuple[Any, ...] | None:
        """What decides the outcome of a cell's first stage, equal for cells that can share it; None without stages."""
        plan = _plan(self.tuning_of(cell), cell.method)
        return (cell.trained_task, cell.seed, *plan[0]) if plan else None


def _named(varied: Iterable[tuple[str, float]], names: Mapping[str, str]) -> str:
    """What a cell's folder says of its settings, with other names for some: `learning_rate_0.1_l2sp_weight_0.01`."""
    return "_".join(f"{names.get(name, name)}_{value}" for name, value in varied)


def _plan(tuning: Tuning, method: str) -> list[tuple[Any, ...]]:
    """The stages of a method, each with how it trains."""
    return [(stage, tuning.of(stage)) for stage in tuning.method(method).stages]


def _check_folder(what: str, name: str, others: Iterable[str] = ()) -> None:
    """Raises UserError for a folder outside the comparison's, or one in it that is or may become another one's."""
    first, *rest = PurePath(name).parts or ("",)
    too_long = any(len(os.fsencode(part)) > 200 for part in (first, *rest))  # 255 bytes, less a temporary file's prefix
    if not first or ".." in (first, *rest) or PurePath(name).is_absolute() or too_long:
        raise UserError(f"{what} becomes a folder in the comparison's own, which {name!r} cannot be.")
    if first in others or methods.parse(first)[0] in methods.METHODS:
        raise UserError(f"{what} becomes a folder, and that of {name!r} is for the cells of {first!r}: choose another.")
