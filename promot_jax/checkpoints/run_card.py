"""What a model card says of a model that a run made, from the records that the run left."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from promot_jax import assets, methods
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.huggingface.model_card import Card
from promot_jax.checkpoints.stage_folder import describe
from promot_jax.params import soft_prompts
from promot_jax.results import schema
from promot_jax.results.schema import Run
from promot_jax.results.scores import Interval

_CONFIG = "config.gin"  # that the command leaves in a run's folder


def card_of(checkpoint: str, prompt_paths: Sequence[str] = (), hub: str = "") -> Card:
    """Collects base model, licence, method, task, scores and an example.

    Args:
        checkpoint: path of the model, as `pretrained.load` takes it.
        prompt_paths: of its soft prompts, whose run is asked where no run trained the model.
        hub: "org/name" where the export is pushed to.

    Raises:
        UserError: a record of the run is damaged.
    """
    stages = pretrained.trained_by(checkpoint)
    base = stages[-1][1].checkpoint if stages else checkpoint
    card = Card(base_model=base, license=_license(base), hub=hub)
    stage_folders = [stages[0][0]] if stages else [soft_prompts.array_path(path).parents[1] for path in prompt_paths]
    runs = list(filter(None, map(_run_of, stage_folders)))
    if not runs:
        return card
    folder, run = runs[0]
    config = folder / _CONFIG
    inputs = [sample.input for sample in run.samples if run.target and sample.task == run.target.task]
    return dataclasses.replace(
        card,
        method=methods.label(run.method),
        task=run.target.task if run.target else "",
        scores=_scores(run),
        config=config.read_text("utf-8") if config.is_file() else "",
        example=inputs[0] if inputs else card.example,
    )


def _run_of(stage_folder: Path) -> tuple[Path, Run] | None:
    """The finished run that a stage belongs to, and its folder: the stage's own or the one around it."""
    stage = describe(stage_folder)
    for folder in (stage_folder, stage_folder.parent) if stage else ():
        if (folder / "results.json").is_file() and isinstance(run := schema.read(folder), Run):
            return folder, run
    return None


def _scores(run: Run) -> tuple[tuple[str, str], ...]:
    scores = []
    if run.target and run.target.score is not None:
        name = f"target, {run.target.metric}, n = {run.target.n}"
        scores.append((name, _number(run.target.score, run.target.ci95)))
    for shots, icl in run.icl.items():
        if icl.norm_avg is not None:
            n = sum(task.n for task in icl.tasks.values())
            name = f"ICL, {shots} shot, mean of {len(icl.tasks)} tasks, n = {n}"
            scores.append((name, _number(icl.norm_avg, icl.ci95)))
    return tuple(scores)


def _number(score: float, interval: Interval | None) -> str:
    return f"{score:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _license(base: str) -> str:
    """The licence of a base model: of an asset, or as the model card in its folder says it; "" where nothing does."""
    if base.startswith("asset:"):
        name = base.removeprefix("asset:").partition("/")[0]
        return assets.ASSETS[name].licence if name in assets.ASSETS else ""
    readme = Path(base) / "README.md"
    if not readme.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", errors="replace"), re.S)
    line = re.search(r"^license: *[\"']?([^\"'\n]+)", front[1], re.M) if front else None
    return line[1].strip() if line else ""
