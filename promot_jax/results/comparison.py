"""Runs of several methods joined to one comparison."""

from collections.abc import Iterable

from promot_jax.methods import REFERENCE, is_plain
from promot_jax.results.matched_target import matched, model_tuning
from promot_jax.results.records import replace
from promot_jax.results.schema import Comparison, Matched, Run
from promot_jax.results.scores import Icl, Target, Tested


def comparison(runs: Iterable[Run]) -> Comparison:
    """Groups runs by method, ascending by seed, methods in order of appearance.

    Where several methods tune the model, each of their runs gets `matched`: its scores on the validation split at the
    checkpoint where all methods are equally good at the fine-tuned task (`promot_jax.results.matched_target.matched`).
    So do pretrained runs: what one of those methods scored before its first update. Stripped, that is the pretrained
    model; its target score counts only of methods that ask for the target as they ask the pretrained model.

    Where the test scores of all these checkpoints of a seed are known, they are `matched_test` of its runs.
    """
    by_seed: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_seed.setdefault(run.method, {})[run.seed] = replace(run, matched=None, matched_test=None)
    by_seed = {name: dict(sorted(known.items())) for name, known in by_seed.items()}
    seeds = sorted({seed for known in by_seed.values() for seed in known})
    matches = matched({name: [known[s].curve if s in known else [] for s in seeds] for name, known in by_seed.items()})
    for name, of_method in matches.items() if len(matches) > 1 else ():
        for seed, match in zip(seeds, of_method, strict=True):
            if match is not None:
                by_seed[name][seed] = replace(by_seed[name][seed], matched=_scores_at(by_seed[name][seed], match.step))
    for seed in seeds:
        _add_test(by_seed, seed)
    for seed, run in by_seed.get(REFERENCE, {}).items():
        tuned = [known[seed] for known in by_seed.values() if seed in known and known[seed].matched]
        starts = [(other.method, scores) for other in tuned if (scores := _scores_at(other, 0))]
        plain = [scores for method, scores in starts if is_plain(method)]
        stripped = [replace(scores, target=None) for _, scores in starts]
        by_seed[REFERENCE][seed] = replace(run, matched=next(iter(plain + stripped), None))
    return Comparison(methods={name: list(known.values()) for name, known in by_seed.items()})


def _add_test(by_method: dict[str, dict[int, Run]], seed: int) -> None:
    """Gives the runs of a seed, pretrained included, their scores on the test split at matched target score."""
    runs = {name: of[seed] for name, of in by_method.items() if seed in of}
    tested = {name: _test_at(run, run.matched.step) for name, run in runs.items() if run.matched}
    if tested and all(tested.values()):
        tested |= {REFERENCE: _final(runs[REFERENCE])} if REFERENCE in runs else {}
        for name, scores in tested.items():
            by_method[name][seed] = replace(runs[name], matched_test=scores)


def _test_at(run: Run, step: int) -> Tested | None:
    """Scores of a run on the test split at one step of its model tuning; None where they are not known."""
    point = next(point for point in model_tuning(run.curve) if point.step == step)
    if point.test is None:
        return _final(run) if run.best_step.get(point.stage) == step else None
    target = point.test.target
    if target and run.target:  # under the name that the comparison gives to it
        target = replace(target, task=run.target.task, shots=run.target.shots)
    return replace(point.test, target=target)


def _final(run: Run) -> Tested:
    """The final evaluation of a run."""
    return Tested(target=run.target, icl=run.icl, example_scores=run.example_scores)


def _scores_at(run: Run, step: int) -> Matched | None:
    """Scores of a run at one step of its model tuning; None where its curve holds no tasks."""
    point = next((point for point in model_tuning(run.curve) if point.step == step), None)
    if run.target is None or point is None or not point.tasks:
        return None
    task, metric, n = run.target.task, run.target.metric, point.target_n or 0
    target = Target(task=task, metric=metric, score=point.target, ci95=point.target_ci95, n=n)
    icl = Icl.of(point.tasks, draws=point.draws)
    return Matched(step=step, target=target, icl={str(run.settings["curve_shots"]): icl})


def as_comparison(results: Run | Comparison) -> Comparison:
    """A comparison as it is, a single run as the comparison that holds it alone."""
    return comparison([results]) if isinstance(results, Run) else results
