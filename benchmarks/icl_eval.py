"""ICL evaluation end to end, launch to scores, against lm-eval on the same prompts.

Ours is the job `icl_eval.gin`: 250 four-shot prompts of ten tasks, up to 48 new tokens, stop at a newline; its programs
come from the compilation cache, as in any second evaluation. lm-eval gets the finished prompts (its own building of
tasks and its metrics are left out) and its transformers back end, at its fastest batch size and output limits.
Time: 60 minutes on two cores; --quick --pairs 1: 6 minutes.
"""

from collections.abc import Sequence

from benchmarks import models, prompts
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import MEMORY, Column, Question, main


def cases(quick: bool) -> Sequence[Case]:
    """Exemplars drawn per example and per task."""
    draws = {"icl_eval_vs_lm_eval": "per_example", "icl_eval_vs_lm_eval_per_task": "per_task"}
    return [_case(key, exemplars, quick) for key, exemplars in draws.items()]


def _case(key: str, exemplars: str, quick: bool) -> Case:
    folder, examples = models.decoder(quick), 1 if quick else 25
    file = prompts.ensure(folder, examples, exemplars)
    settings = {"Evaluation.examples": examples, "Evaluation.shots": (prompts.SHOTS,), "MIXTURE_OR_TASK_NAME": ""}
    settings["Evaluation.exemplars"] = exemplars
    command = models.job_command(None, "icl_eval.gin", INITIAL_CHECKPOINT_PATH=folder, **settings)
    ours = {"command": command, "outputs": f"outputs/icl_{prompts.SHOTS}shot.jsonl"}
    theirs = {"folder": str(folder), "prompts": str(file)}
    variants = {
        f"batches of {size}, {'limits per task' if limits else 'limit 48'}": {"batch_size": size, "task_limits": limits}
        for size in ((8,) if quick else (8, 16, 32, 64))
        for limits in ((True,) if quick else (False, True))
    }
    sides = (
        Side("ours_f32", "benchmarks.commands:job", ours),
        Side("lm_eval_f32", "benchmarks.baselines:lm_eval", theirs, variants, race={"every": 4}),
    )
    ratios = [Ratio(key, "wall_seconds", "ours_f32", "lm_eval_f32")]
    return Case(exemplars, sides, tuple(ratios), race="wall_seconds", warm_up=("ours_f32",))


COLUMNS = {
    "wall_seconds": Column("seconds, launch to end"),
    "generation_seconds": Column("of them generation"),
    **MEMORY,
}
QUESTION = Question("icl_eval", cases, COLUMNS)

if __name__ == "__main__":
    main(QUESTION)
