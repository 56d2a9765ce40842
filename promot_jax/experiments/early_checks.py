"""What can be said of an experiment's names in a second: before TensorFlow is imported, which takes ten or more."""

import ast
import importlib.util
import re
from pathlib import Path

from promot_jax.checkpoints.locate import is_remote, spelled
from promot_jax.data import columns, files, shots
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.settings import Experiment
from promot_jax.params import soft_prompts

OWN = "promot_jax.tasks."


def check_names(experiment: Experiment) -> None:
    """Raises UserError for a model's path where nothing is, a module that is not there, or a task none of ours has.

    Whether a path holds a model, and which tasks a user's own module registers, is seen later.
    """
    path = spelled(experiment.checkpoint)
    if not is_remote(path) and not path.startswith("asset:"):
        try:
            found = Path(path).exists()
        except OSError:  # a name that is too long, which reading says
            found = True
        if not found:
            hint = f"; a model of the Hugging Face hub is hf://{path}" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
            raise UserError(f"There is no model at {path!r}{hint}; set INITIAL_CHECKPOINT_PATH.")
    given = experiment.prompt_path
    for path in [given] if isinstance(given, str) else given.values() if given else ():
        if path and not is_remote(path) and not Path(path).exists():
            soft_prompts.array_path(path)  # says so
    if experiment.data:
        columns.of(experiment.data, files.read(experiment.data.path))
    modules = [experiment.modules] if isinstance(experiment.modules, str) else [*experiment.modules]
    for module in modules:
        try:
            known = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            known = False
        except Exception:  # of whatever its package does when it is imported, which importing the module says
            return
        if not known:
            raise UserError(f"There is no task module {module!r}; set MIXTURE_OR_TASK_MODULE.")
    if modules and all(module.startswith(OWN) for module in modules):  # without one, this process registers them
        texts, named = _words([*shots.BUILT_IN, *modules])
        if experiment.data:
            texts.add(experiment.data.task)
        for setting, name in (("MIXTURE_OR_TASK_NAME", experiment.task), ("ICL_MIXTURE", experiment.icl_mixture)):
            base, _ = shots.split(name)
            if name and not {name, base} & texts:
                hint = nearest(base, named)
                raise UserError(
                    f"No task or mixture is called {name!r}{hint}; set {setting} or MIXTURE_OR_TASK_MODULE."
                )


def _words(modules: list[str]) -> tuple[set[str], set[str]]:
    """All texts in our modules, among which are the names of their tasks, and those that a call begins with."""
    texts: set[str] = set()
    named: set[str] = set()
    for spec in filter(None, map(importlib.util.find_spec, modules)):
        for node in ast.walk(ast.parse(Path(spec.origin or "").read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                named.add(str(node.args[0].value))
    return texts, {name for name in named if name.isidentifier()}
