"""The hook that the training loop is given: evaluates a checkpoint on the validation split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.evaluation import example_scores
from promot_jax.experiments import given_targets
from promot_jax.experiments.final_evaluation import outputs_of_test, score_test, write_outputs
from promot_jax.experiments.given_targets import TRAIN, GivenTargets
from promot_jax.experiments.initial_params import prompts_of_tasks
from promot_jax.experiments.session import Session
from promot_jax.methods.base import Stage
from promot_jax.params import lora
from promot_jax.results import records
from promot_jax.results.scores import first_of_each_task
from promot_jax.trackers.writer import Writer

Json = dict[str, Any]
Evaluate = Callable[[trees.Tree, int], Json]

_GENERATIONS = 3  # outputs of each task that trackers get, of its first examples


def curve_evaluation(session: Session, folder: Path, stage: Stage, writer: Writer) -> Evaluate:
    """Returns what evaluates parameters on the validation split: `(params, step)` to the scores of that step.

    It scores the fine-tuning task with its soft prompt prepended and, where the stage tunes the model, ICL with the
    prompt stripped; it writes the outputs to `outputs/` in the stage's folder, and the first of each task to `writer`.
    The task's loss there is among the scores, at step 0 the loss on training examples too, with `Evaluation.divergence`
    how far the model is from the base, and with `Evaluation.curve_test` the scores of the test split.
    """
    settings = session.experiment.evaluation
    validation: list[GivenTargets] = []  # read and encoded at the first step
    divergence = _Divergence(session) if settings.divergence and stage.tunes_model else None

    def evaluate(params: trees.Tree, step: int) -> Json:
        names = prompts_of_tasks(session.experiment, params.get("prompt"))
        merged = lora.merge(params, stage.lora)
        prompt, limit = merged.get("prompt"), settings.curve_target_examples
        if not validation:
            validation.append(given_targets.of_target(session, prompt, settings.curve_split, limit))
        target = session.evaluator.target(merged, settings.curve_split, settings.curve_target_examples, names)
        rows, entry = target.rows, target.entry
        scores: Json = {"target": entry.score, "target_ci95": entry.ci95, "target_n": entry.n}
        scores["validation_loss"] = validation[0].loss(merged)
        if step == 0 and stage.tunes_model:
            scores["initial_loss"] = given_targets.of_target(session, prompt, TRAIN, limit).loss(merged)
        stripped = merged if stage.keeps_lora else {"model": params["model"]}
        if stage.tunes_model:
            scores["example_scores"] = example_scores.of_target(entry, rows)
        if divergence:
            scores |= divergence(stripped["model"])
        if settings.curve_examples and session.experiment.icl_mixture and stage.tunes_model:
            limits = (settings.curve_shots, settings.curve_split, settings.curve_examples)
            icl, icl_rows = session.evaluator.icl(stripped, *limits, intervals=False, draws=settings.curve_draws)
            scores |= {"icl": icl.norm_avg, "format_share": icl.format_share, "tasks": icl.tasks, "draws": icl.draws}
            scores["example_scores"] |= example_scores.of_icl(settings.curve_shots, icl, icl_rows)
            rows = rows + icl_rows
        if settings.curve_test and stage.tunes_model:
            scores["test"], outputs_of = score_test(session, merged, stripped, names)
            write_outputs(outputs_of_test(folder, step), outputs_of)
        outputs = [records.replace(row, step=step) for row in rows]
        files.write_rows(folder / "outputs" / f"step_{step:06d}.jsonl", outputs)
        writer.outputs(step, first_of_each_task(rows, _GENERATIONS))
        return files.plain(scores)  # as checkpoints hold them

    return evaluate


class _Divergence:
    """How far a model's predictions are from the base model's: KL(base || model), both without a soft prompt."""

    def __init__(self, session: Session):
        """Reads the examples of the curve: the fine-tuning task's, and those of the ICL mixture if there is one."""
        experiment, settings = session.experiment, session.experiment.evaluation
        self._base = session.base.params
        limit = settings.curve_target_examples
        self._examples = {"kl_target": given_targets.of_target(session, None, settings.curve_split, limit)}
        if experiment.icl_mixture and settings.curve_examples:
            self._examples["kl_icl"] = given_targets.of_icl(session)

    def __call__(self, model: trees.Tree) -> Json:
        """The means over target tokens, by their names in `StepEvaluation`."""
        return {name: examples.divergence(self._base, model) for name, examples in self._examples.items()}
