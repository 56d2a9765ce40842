"""The cells of a comparison, tasks x seeds x methods x settings: where each lies and what it runs with."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from promot_jax.errors import UserError, nearest
from promot_jax.experiments.settings import Experiment
from promot_jax.methods import stages
from promot_jax.methods.stages import Stage
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.tuning import Tuning

_PLAIN = ("l2sp", "kl", "freeze")  # settings that are one number; of the others an optimizer's learning rate is varied
_WITH_SHOTS = re.compile(r"(?P<method>.+)_(?P<shots>[1-9]\d*)shot")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        task: the fine-tuning task, without a number of shots.
        seed: of the run.
        method: a key of `stages.METHODS`.
        shots: exemplars in front of every training input (the paper's "+ 1-shot").
        varied: what the grid sets of the settings, as (field of `Tuning`, value).
        folder: of the run.
    """

    task: str
    seed: int
    method: str
    shots: int
    varied: tuple[tuple[str, float], ...]
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
    """A comparison's settings.

    Attributes:
        workdir: of the comparison.
        experiment: model and data; each cell replaces the task, its lengths and the seeds.
        tuning: settings of the stages, the same for every method; each cell replaces what is varied.
        methods: keys of `stages.METHODS`, with `_1shot` for one exemplar in front of every training input.
        seeds: each once.
        varied: values by field of `tuning`. Of "prompt" and "model", the two kinds of stage, of "lora_optimizer" and,
            where joint tuning has an optimizer for its prompt, of "joint_prompt" they are learning rates; "l2sp", "kl"
            and "freeze" (a number of layers) are tried as they are. What is not named keeps its one value.
        tasks: fine-tuning tasks, each with its `feature_lengths`; none for the experiment's own.
        report: folder in `workdir` for results and report, "" for `workdir` itself: comparisons of other methods or
            seeds over the same cells each have their own.
        margin: points of target score on the validation split that are given up for ICL where settings are chosen.
    """

    workdir: Path
    experiment: Experiment
    tuning: Tuning
    methods: Sequence[str]
    seeds: Sequence[int]
    varied: Mapping[str, Sequence[float]]
    tasks: Mapping[str, Mapping[str, int]]
    report: str = ""
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for a grid that cannot be run."""
        for method in self.methods:
            stages.method(_parse(method)[0])
        fields = [field.name for field in dataclasses.fields(self.tuning)]
        known = [name for name in fields if name in _PLAIN or _optimizer(self.tuning, name)]
        for name, tried in self.varied.items():
            if name not in known:
                raise UserError(f"No setting {name!r} can be varied{nearest(name, known)}.")
            kind = int if name == "freeze" else int | float
            if not all(isinstance(value, kind) and 0 < value < math.inf for value in tried):
                wanted = "whole numbers of layers" if name == "freeze" else "positive numbers"
                raise UserError(f"Values to try of {name!r} are {wanted}, not {list(tried)}.")
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
            method, shots = _parse(label)
            for varied in itertools.product(*self._varied_of(method)):
                names = [_folder(name, value) for name, value in varied]
                parts = [task] * bool(self.tasks) + [label] + ["_".join(names)] * bool(names) + [f"seed_{seed}"]
                yield Cell(task, seed, method, shots, varied, self.workdir.joinpath(*parts))

    def _varied_of(self, method: str) -> list[list[tuple[str, float]]]:
        """(field, value) of what is varied of a method: of the fields that make a difference to its stages."""
        plan, found = stages.method(method), []
        firsts = {name: values[0] for name, values in self.varied.items()}
        for name, values in self.varied.items():
            one, other = (with_settings(self.tuning, firsts | {name: value}) for value in (1, 2))
            if any(one.of(stage) != other.of(stage) for stage in plan):
                found.append([(name, value if name == "freeze" else float(value)) for value in values])
        return found

    def experiment_of(self, cell: Cell) -> Experiment:
        """The experiment of a cell: its task with room for its exemplars, its seed, for the evaluation's too."""
        lengths = dict(self.tasks.get(cell.task) or self.experiment.feature_lengths)
        if cell.shots:
            lengths["inputs"] = lengths.get("inputs", 0) * (1 + cell.shots) + lengths.get("targets", 0) * cell.shots
        return dataclasses.replace(
            self.experiment,
            task=cell.trained_task,
            feature_lengths=lengths,
            seed=cell.seed,
            evaluation=dataclasses.replace(self.experiment.evaluation, exemplar_seed=cell.seed),
        )

    def tuning_of(self, cell: Cell) -> Tuning:
        """The settings of a cell's stages."""
        return with_settings(self.tuning, dict(cell.varied))

    def first_stage(self, cell: Cell) -> tuple[Any, ...] | None:
        """What decides the outcome of a cell's first stage, equal for cells that can share it; None without stages."""
        plan: tuple[Stage, ...] = stages.method(cell.method)
        return (cell.trained_task, cell.seed, plan[0], self.tuning_of(cell).of(plan[0])) if plan else None


def with_settings(tuning: Tuning, values: Mapping[str, float]) -> Tuning:
    """The settings with other values by field: a learning rate where the field is or has an optimizer."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        settings, optimizer = getattr(tuning, name), _optimizer(tuning, name)
        changed[name] = value
        if optimizer is not None:
            other = dataclasses.replace(optimizer, learning_rate=value)
            changed[name] = other if settings is optimizer else dataclasses.replace(settings, optimizer=other)
    return dataclasses.replace(tuning, **changed)


def _folder(name: str, value: float) -> str:
    """What a cell's folder says of a setting: `lr_0.1`, `prompt_lr_0.1`, `l2sp_0.1`."""
    kind = f"{name}_" if name in _PLAIN else "" if name == "model" else f"{name}_lr_"
    return f"{kind or 'lr_'}{value}"


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
