"""Every checkpoint that was scored on the test split (`Evaluation.curve_test`), task by task, as a table."""

from collections.abc import Sequence

from promot_jax.methods import label
from promot_jax.report import frontier
from promot_jax.report.tables import ABSENT, number, ordered, place, varied
from promot_jax.results import bootstrap
from promot_jax.results.frontier import by_setting
from promot_jax.results.matched_target import model_tuning
from promot_jax.results.schema import Comparison
from promot_jax.results.scores import Icl, Interval, Tested

READING = (
    "Test split, ICL at {shots} shot(s), mean over seeds. In brackets the 95 % bootstrap interval over examples, where "
    "there is one seed. Of a task with a label set: the score of its generated answers / the percentage of examples "
    "whose right label is the likeliest. Where the first falls and the second stays, what is lost is the format."
)


def rows(results: Comparison) -> tuple[list[list[str]], str]:
    """The table of text, the header first, and how it is read; empty if no checkpoint was scored on the test split."""
    shots = frontier.curve_shots(results)
    by_checkpoint: dict[tuple[str, str, str], list[tuple[Tested, Icl]]] = {}
    for method in ordered(results.methods):
        for settings, run in by_setting(results, method):
            points = {place(p.step, p.alpha): p.test for p in model_tuning(run.curve) if p.step and p.test}
            tested = points or {ABSENT: Tested(target=run.target, icl=run.icl)}
            for where, scores in tested.items():
                if shots in scores.icl:
                    by_checkpoint.setdefault((method, varied(settings), where), []).append((scores, scores.icl[shots]))
    if all(where == ABSENT for _, _, where in by_checkpoint):
        return [], ""
    tasks = list(dict.fromkeys(name for runs in by_checkpoint.values() for _, icl in runs for name in icl.tasks))
    table = [["method", "setting", "checkpoint", "target score", "ICL", "format share (%)", *tasks, "seeds"]]
    for (method, setting, where), runs in by_checkpoint.items():
        targets, icls = [scores.target for scores, _ in runs if scores.target], [icl for _, icl in runs]
        cells = [_mean([target.score for target in targets], [target.ci95 for target in targets])]
        cells += [_mean([icl.norm_avg for icl in icls], [icl.ci95 for icl in icls])]
        cells += [_mean([icl.format_share for icl in icls]), *(_task(icls, name) for name in tasks)]
        table.append([label(method), setting or ABSENT, where, *cells, str(len(runs))])
    return table, READING.format(shots=shots)


def _task(icls: Sequence[Icl], name: str) -> str:
    """`85.0 / 87.0`: the score of generated answers, and of labels by likelihood where the task has that."""
    scores = [icl.tasks[name] for icl in icls if name in icl.tasks]
    generated, likeliest = _mean([s.score for s in scores]), _mean([s.acc for s in scores])
    return generated if likeliest == ABSENT else f"{generated} / {likeliest}"


def _mean(values: Sequence[float | None], intervals: Sequence[Interval | None] = ()) -> str:
    """The mean over seeds, with the interval of a single one."""
    spread = bootstrap.across_seeds(values)
    shown = number(spread[0] if spread else None)
    return shown + (frontier.interval(intervals[0]) if len(intervals) == 1 else "")
