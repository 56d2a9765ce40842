"""Job `compare`: methods x seeds x settings x tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from promot_jax.errors import UserError
from promot_jax.experiments.settings import Experiment
from promot_jax.sweep import scheduler as comparison
from promot_jax.sweep.grid import RENAMED, Grid
from promot_jax.training.settings import Tuning


def compare(
    workdir: Path,
    experiment: Experiment,
    tuning: Tuning,
    methods: Sequence[str],
    seeds: int | Sequence[int] = (0,),
    varied: Mapping[str, Sequence[float]] | None = None,
    tasks: Mapping[str, Mapping[str, int]] | None = None,
    wait: bool = True,
    stale: float = 600.0,
    report: str = "",
    margin: float = 0.0,
    serve: int | None = None,
    learning_rates: Mapping[str, Sequence[float]] | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    archive: str = "",
    run_cells: bool = True,
) -> None:
    """Job: runs tasks x seeds x methods x settings, each cell in a folder of its own, and reports them.

    Safe to kill and run again: finished cells are kept, the others go on where they stopped. The same command on
    further machines that share the folder takes on cells that nobody works on.

    Args:
        workdir: of the comparison. A cell lies in `<method>/seed_<seed>`; with tasks in a folder of each task, with
            settings to try in one of each: `<task>/<method>/learning_rate_<rate>/seed_<seed>`.
        experiment: model and data; its seed is replaced by each of `seeds`, the exemplars' seed too.
        tuning: settings of the stages, the same for every method.
        methods: names (`methods.METHODS`); with `_1shot` at the end, trained with one exemplar in front of every
            input, in inputs with room for another input and a target.
        seeds: one or several.
        varied: values to try, by name: `{"learning_rate": (1e-4, 1e-3), "freeze": (15, 20)}`. The learning rates of the
            model (`learning_rate`), of stage 1 (`prompt_learning_rate`) and of an optimizer that `tuning` has
            (`lora_learning_rate`) can be varied, and hyperparameters that are numbers. A method runs with every
            combination of those that concern it. Of each method the settings that are best on the validation split are
            reported; all are written down.
        tasks: to fine-tune on, each with its `feature_lengths`, `{}` for the experiment's (which may be those of the
            data); None for the experiment's task.
        wait: at the end for cells that run elsewhere; otherwise they are reported as running.
        stale: seconds without a sign of life after which the cell of another machine is taken over.
        report: folder in `workdir` for results and report, "" for `workdir` itself: comparisons of other methods or
            seeds over the same cells each have their own.
        margin: settings are chosen by target score; of those at most so many points below the best, by ICL.
        serve: port of this machine on which `report.html` is served while cells run; None serves nothing.
        learning_rates: an earlier spelling of `varied`, as is `strengths`, with earlier names (`sweep.grid.RENAMED`).
        strengths: see there.
        archive: a folder that gets the results of every finished cell in a small form, and from which cells that it has
            are taken instead of run (`sweep.archive`); "" for none.
        run_cells: False only reports what is there, without a model.

    Raises:
        UserError: a name that is varied twice, or what `sweep.grid.Grid` refuses.
    """
    seed_list = [seeds] if isinstance(seeds, int) else list(seeds)
    tried: dict[str, Sequence[float]] = {}
    for key, values in [pair for given in (varied, learning_rates, strengths) for pair in (given or {}).items()]:
        name = RENAMED.get(key, key)
        if name in tried:
            raise UserError(f"VARIED, LEARNING_RATES and STRENGTHS name {name} twice.")
        tried[name] = values
    grid = Grid(workdir, experiment, tuning, list(methods), seed_list, tried, tasks or {}, report, margin)
    comparison.run(grid, wait, stale, serve, Path(archive) if archive else None, run_cells)
