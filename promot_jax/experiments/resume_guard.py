"""What a folder was started with: a run goes on there only with the same settings."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.data import files as data_files
from promot_jax.errors import UserError
from promot_jax.experiments.session import tasks_of
from promot_jax.experiments.settings import Experiment
from promot_jax.results import records, schema
from promot_jax.results.schema import Run

Json = dict[str, Any]


def earlier_run(workdir: Path, method: str) -> Run | None:
    """The finished run in a folder, if there is one; that of another method is not to be written over."""
    if not (workdir / "results.json").is_file():
        return None
    run = schema.read(workdir)
    if isinstance(run, Run) and run.method == method:
        return run
    of = run.method if isinstance(run, Run) else "a comparison"
    raise UserError(f"{workdir} holds results of {of!r}; give another --workdir.")


def shared_settings(experiment: Experiment) -> Json:
    """The settings of an experiment that its results depend on."""
    from promot_jax.data import examples

    shared = dataclasses.asdict(experiment)
    # A run may go on on another mesh, and where tasks or caches lie changes nothing; but a task that has a cache is
    # read in another order.
    del shared["partitioner"], shared["modules"], shared["cache_dirs"], shared["tracker"]
    # A user's data are what its rows are, wherever they lie.
    del shared["data"]
    if experiment.data:
        chosen = dataclasses.asdict(experiment.data) | {"rows": data_files.read(experiment.data.path).digest}
        shared["data"] = {name: value for name, value in chosen.items() if name != "path"}
    if cached := examples.cached(tasks_of(experiment)):
        shared["cached"] = cached
    return {"experiment": shared}


RENAMED = {"kl": "kl_weight", "l2sp": "l2sp_weight"}  # settings of earlier runs, and their names today
# Settings younger than some runs, or that every stage had once, with the value that the others were done with.
YOUNGER = {
    "alphas": [],
    "kl_weight": 0.0,
    "l2sp_weight": 0.0,
    "data_shards": 1,
    "curve_draws": 1,
    "exemplar_draws": 1,
    "weight_dtype": "float32",
    "pack_batch": False,
    "samples": 5,
    "prompt_task": "",
    "attention": "auto",
    "exemplars": "per_example",
    "likelihood": False,
    "divergence": False,
    "curve_test": False,
}


# What a run or a stage makes in its folder.
FOLDERS = ("checkpoints", "events", "outputs", "preempted", "prompt")

# Settings of the final evaluation alone.
FINAL = ("split", "shots", "examples", "target_examples", "exemplar_draws", "samples")
_IMMATERIAL = ("/log_period", "/keep_period", "/cache_tokens", "/profile")  # settings that change no result


def keep_settings(folder: Path, settings: Json, finished: str = "results.json") -> str:
    """Writes the settings of a run at its start, and refuses to go on in a folder that was started with others.

    Args:
        folder: of the run.
        settings: as they are now.
        finished: name of the file that finished work leaves in the folder.

    Returns:
        A digest of the settings that the run was started with.

    Raises:
        UserError: other settings, damaged ones, none beside finished work, or a file in the place of a folder.
    """
    for name in FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise UserError(f"{folder / name} is a file, where the run makes a folder; take it away.")
    path = folder / "settings.json"
    advice = f"put it back, or delete {folder} to start again"
    if not path.exists():
        if (folder / finished).is_file():
            raise UserError(f"{folder} holds a finished {finished}, but no settings.json that says of what: {advice}.")
        files.write(settings, path)
    document = records.read(path, dict[str, Any], advice)
    before = {_renamed(key): value for key, value in trees.flatten(document).items()}
    recorded = {key: value for key, value in trees.flatten(document).items() if not key.endswith(_IMMATERIAL)}
    now = trees.flatten(files.plain(settings))
    for key in sorted({*before, *now}):
        for one in (before, now):
            one.setdefault(key, YOUNGER.get(key.rpartition("/")[2]))
        if before.get(key) != now.get(key) and not key.endswith(_IMMATERIAL):
            raise UserError(
                f"{folder} was started with {key} = {before.get(key)}, now it is {now.get(key)}: "
                f"{_advice(folder / finished, key)}."
            )
    return hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()


def _advice(finished: Path, key: str) -> str:
    """What to do in the place of going on with another value: of some settings the work that is done can be kept.

    `finished` is the file that finished work leaves.
    """
    head, _, name = key.rpartition("/")
    if head == "experiment/evaluation" and name in FINAL and finished.name == "results.json":  # not of a stage's curve
        return f"delete {finished} to evaluate it anew, what it trained is kept; or give another --workdir"
    advice = "give another --workdir, or delete the folder to start again"
    if name == "steps":
        advice += (
            f"; to train a finished model further, give --gin.INITIAL_CHECKPOINT_PATH={finished.parent} and another "
            "--workdir (the learning-rate schedule starts anew)"
        )
    return advice


def _renamed(key: str) -> str:
    head, slash, name = key.rpartition("/")
    return head + slash + RENAMED.get(name, name)
