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
    """The table of text, the header first, and how it is read; no row where no checkpoint was scored there."""
    shots = frontier.curve_shots(results)
    found: dict[tuple[str, str, str], list[tuple[Tested, Icl]]] = {}
    for method in ordered(results.methods):
        for settings, run in by_setting(results, method):
            points = {place(p.step, p.alpha): p.test for p in model_tuning(run.curve) if p.step and p.test}
            tested = points or {ABSENT: Tested(target=run.target, icl=run.icl)}
            for where, scores in tested.items():
                if shots in scores.icl:
                    found.setdefault((method, varied(settings), where), []).append((scores, scores.icl[shots]))
    if all(where == ABSENT for _, _, where in found):
        return [], ""
    tasks = list(dict.fromkeys(name for of in found.values() for _, icl in of for name in icl.tasks))
    table = [["method", "setting", "checkpoint", "target score", "ICL", "format share (%)", *tasks, "seeds"]]
    for (method, setting, where), of in found.items():
        targets = [scores.target for scores, _ in of if scores.target]
        cells = [_mean([t.score for t in targets], [t.ci95 for t in targets])]
        cells += [_mean([icl.norm_avg for _, icl in of], [icl.ci95 for _, icl in of])]
        cells += [_mean([icl.format_share for _, icl in of])]
        cells += [_task([icl for _, icl in of], name) for name in tasks]
        table.append([label(method), setting or ABSENT, where, *cells, str(len(of))])
    return table, READING.format(shots=shots)


def _task(icls: Sequence[Icl], name: str) -> str:
    """`85.0 / 87.0`: the score of generated answers, and of labels by likelihood where the task has that."""
    scores = [icl.tasks[name] for icl in icls if name in icl.tasks]
    generated, likeliest = _mean([s.score for s in scores]), _mean([s.acc for s in scores])
    return generated if likeliest == ABSENT else f"{generated} / {likeliest}"


def _mean(values: Sequence[float | None], intervals: Sequence[Interval | None] = ()) -> str:
    """The mean over seeds, with the interval of a single one."""
    found = bootstrap.across_seeds(values)
    shown = number(found[0] if found else None)
    return shown + (frontier.interval(intervals[0]) if len(intervals) == 1 else "")
