"""Job `compare`: methods x seeds x settings x tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment
from promot_jax.sweep import scheduler as comparison
from promot_jax.sweep.grid import Grid
from promot_jax.training.tuning import Tuning


def compare(
    workdir: Path,
    experiment: Experiment,
    tuning: Tuning,
    methods: Sequence[str],
    seeds: int | Sequence[int] = (0,),
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    tasks: Mapping[str, Mapping[str, int]] | None = None,
    wait: bool = True,
    stale: float = 600.0,
    report: str = "",
    margin: float = 0.0,
    serve: int | None = None,
) -> None:
    """Job: runs tasks x seeds x methods x settings, each cell in a folder of its own, and reports them.

    Safe to kill and run again: finished cells are kept, the others go on where they stopped. The same command on
    further machines that share the folder takes on cells that nobody works on.

    Args:
        workdir: of the comparison. A cell lies in `<method>/seed_<seed>`; with tasks in a folder of each task, with
            settings to try in one of each: `<task>/<method>/lr_<rate>/seed_<seed>`.
        experiment: model and data; its seed is replaced by each of `seeds`, the exemplars' seed too.
        tuning: settings of the stages, the same for every method.
        methods: keys of `stages.METHODS`; with `_1shot` behind, trained with one exemplar in front of every input, in
            inputs with room for another input and a target.
        seeds: one or several.
        learning_rates: to try, by kind of stage: `{"prompt": (0.1, 0.2), "model": (1e-4, 1e-3)}`; further kinds are
            "lora_optimizer" and, where `tuning` has it, "joint_prompt". A method with both kinds runs with every pair.
        strengths: to try, of what sets rivals apart: `{"l2sp": (0.01, 0.1), "kl": (0.1, 1.0), "freeze": (15, 20)}`. Of
            each method the settings that are best on the validation split are reported; all are written down.
        tasks: to fine-tune on, each with its `feature_lengths` (`{}` for the experiment's); None for the experiment's.
        wait: at the end for cells that run elsewhere; otherwise they are reported as running.
        stale: seconds without a sign of life after which the cell of another machine is taken over.
        report: folder in `workdir` for results and report, "" for `workdir` itself: comparisons of other methods or
            seeds over the same cells each have their own.
        margin: settings are chosen by target score; of those at most so many points below the best, by ICL.
        serve: port of this machine on which `report.html` is served while cells run; None serves nothing.
    """
    wanted = [seeds] if isinstance(seeds, int) else list(seeds)
    rates, others = learning_rates or {}, strengths or {}
    if twice := sorted({*rates} & {*others}):
        raise UserError(f"LEARNING_RATES and STRENGTHS both name {', '.join(twice)}.")
    varied = {**rates, **others}
    grid = Grid(workdir, experiment, tuning, list(methods), wanted, varied, tasks or {}, report, margin)
    comparison.run(grid, wait, stale, serve)
