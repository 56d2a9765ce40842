"""A stage's folder opened again, finished or still running: its settings, its parameters at a step, its batches."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax import methods, trees
from promot_jax.checkpoints import stage_folder
from promot_jax.checkpoints.orbax import Saved
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments.initial_params import fresh_lora, fresh_prompt, saved_prompts
from promot_jax.experiments.session import Session, open_session
from promot_jax.experiments.settings import Experiment
from promot_jax.experiments.train_stream import train_batches
from promot_jax.params.fingerprint import fingerprint
from promot_jax.params.lora import Lora
from promot_jax.params.soft_prompts import PromptInit
from promot_jax.results import records
from promot_jax.results.schema import StageRecord

Json = dict[str, Any]

# What a stage's batches and first parameters depend on; the rest of the experiment is the caller's.
OWN = (
    "checkpoint",
    "task",
    "feature_lengths",
    "seed",
    "dtype",
    "prompt_length",
    "prompt_path",
    "prompt_task",
    "force_prompt",
)
OLDER = {"vocabulary": "", "data_shards": 1, "prompt_task": ""}  # as runs were done before these were settings


@dataclasses.dataclass(frozen=True)
class Revisited:
    """A stage as it was trained."""

    folder: Path
    session: Session  # the base model and the data, with the run's own settings
    settings: Json  # `settings.json` of the stage
    start: trees.Tree  # {"model", "prompt": {task: rows}, "lora"} before the first update, of what was attached

    @property
    def lora(self) -> Lora | None:
        """Shape of the LoRA that was attached, None for none."""
        return _lora(self.settings)

    @property
    def prompt(self) -> str:
        """Name of the prompt that stood in front of the training inputs, "" for none."""
        return self.session.experiment.task if "prompt" in self.start else ""

    def steps(self) -> list[int]:
        """Steps whose parameters are there: 0, and those of the checkpoints that were kept."""
        return [0, *hosts.decide(Saved(self.folder / "checkpoints").steps, "the checkpoints that were kept")]

    def at(self, step: int) -> trees.Tree:
        """All parameters at a step.

        Raises:
            UserError: no checkpoint of that step was kept.
        """
        if step == 0:
            return self.start
        kept = self.steps()
        if step not in kept:
            raise UserError(
                f"{self.folder} has no checkpoint of step {step} (it has {', '.join(map(str, kept))}); train with "
                "Training.keep_period to keep more than the newest and the best."
            )
        return stage_folder.overlay(self.folder, step, self.start)

    def batches(self, prompt: bool, layout: Callable[..., Any]) -> Iterator[Any]:
        """The training batches from step 0 on, one example per row and without replayed text.

        Of several shards of the data, the rows are laid out together, on every host; `layout` takes
        `(rows, inputs, targets)` as `Model.layout`. With `prompt` the run's prompt stands in front of the inputs.
        """
        soft, size = self.start["prompt"] if prompt else None, self.settings["training"]["batch_size"]
        stream = train_batches(self.session, soft, batch_size=size, layout=lambda *rows: rows, whole=True)[1]
        for parts in zip(*stream.parts.values(), strict=True):
            yield layout([row for rows, _, _ in parts for row in rows], *parts[0][1:])


def open_stage(folder: Path, experiment: Experiment) -> Revisited:
    """Opens a stage's folder.

    Args:
        folder: of a stage, the one that holds `checkpoints/`.
        experiment: modules of the tasks, mesh, and sizes of a model whose checkpoint carries none; the model, the task,
            the seed, the lengths and the prompt are the run's own.

    Raises:
        UserError: not a stage's folder, or what it started from is no longer there.
    """
    settings = hosts.decide(partial(_settings, folder), "the settings of a stage")
    own = OLDER | settings["experiment"]
    taken = {name: own[name] for name in (*OWN, *OLDER)} | {"prompt_init": PromptInit(**own["prompt_init"])}
    session = open_session(dataclasses.replace(experiment, **taken))
    for start in _starts(session, folder, settings):
        if fingerprint(start) == settings["start"]:
            return Revisited(folder, session, settings, start)
    raise UserError(
        f"{folder} started from parameters that are no longer there: put back its base model "
        f"({session.experiment.checkpoint}) and, for a stage with a trained prompt or LoRA, stage 1's folder beside it."
    )


def _settings(folder: Path) -> Json:
    try:
        settings: Json = json.loads((folder / "settings.json").read_text("utf-8"))
        for name in OWN:
            settings["experiment"][name]
        PromptInit(**settings["experiment"]["prompt_init"])
        settings["stage"], settings["training"]["batch_size"], settings["start"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no stage's folder with its settings.json ({type(error).__name__}: {error}). Give the "
            "one with checkpoints/ in it, such as runs/demo/finetune/seed_0/finetune."
        ) from error
    return settings


def _lora(settings: Json) -> Lora | None:
    shape = settings["training"].get("lora")
    return records.parse(shape, Lora, "'lora' in the stage's settings") if shape else None


def _starts(session: Session, folder: Path, settings: Json) -> Iterator[trees.Tree]:
    """What a stage may have started from: the base model alone, or with a trained or fresh prompt or LoRA."""
    model, task = session.base.params, session.experiment.task
    if shape := _lora(settings):
        fresh = {"model": model, "lora": fresh_lora(session, shape)}
        yield fresh
        for name in methods.preceding(settings["stage"]):
            beside = folder.parent / name
            if finished := records.decide(partial(stage_folder.describe, beside), StageRecord, "a finished stage"):
                yield stage_folder.overlay(beside, finished.best_step, fresh)
        return
    yield {"model": model}
    for path in hosts.decide(
        partial(_prompts, session.experiment, folder, settings["stage"]), "the prompts of a stage"
    ):
        experiment = dataclasses.replace(session.experiment, prompt_path=path)
        trained = saved_prompts(dataclasses.replace(session, experiment=experiment))
        yield {"model": model, "prompt": {task: next(iter(trained.values()))} if isinstance(path, str) else trained}
    text = settings["training"].get("prompt_text", "")
    for stage in methods.stages():
        if stage.name == settings["stage"] and stage.prompt:
            yield {"model": model, "prompt": fresh_prompt(session, dataclasses.replace(stage, prompt_text=text))}


def _prompts(experiment: Experiment, folder: Path, stage: str) -> list[str | dict[str, str]]:
    """Where the prompt that a stage was trained with may lie."""
    beside = folder.parent / next(iter(methods.preceding(stage)), stage)
    several = {path.name: str(path) for path in sorted(beside.glob("*")) if stage_folder.describe(path)}
    given = experiment.prompt_path
    paths: list[str | dict[str, str]] = [
        given if isinstance(given, str) else dict(given),
        str(beside) if stage_folder.describe(beside) else "",
        several,
    ]
    if several and not isinstance(given, str):  # some taken from there, the others trained here
        paths.append(several | dict(given))
    paths.append(str(folder) if (folder / "prompt").is_dir() else "")  # a fixed one is the run's own
    return [path for path in paths if path]
