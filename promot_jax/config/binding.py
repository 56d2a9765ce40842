"""Builds what gin files describe: gin resolves references, macros and scopes, and is over before the job starts.

The files are read twice: once to check every name while nothing is imported, and once more when the modules of the
names in use are imported and gin knows them.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config

from promot_jax.config import checks, gin_files
from promot_jax.errors import UserError, nearest


def bind(
    configurables: Mapping[str, str], paths: Iterable[Path], overrides: Iterable[tuple[str, str]] = ()
) -> functools.partial[Any]:
    """Builds everything that gin files and overrides describe.

    Args:
        configurables: every name that gin may configure, and where it is: `{name: "module:attribute"}`.
        paths: gin files, a later one wins.
        overrides: names and texts of `--gin.NAME=TEXT`.

    Returns:
        The job, to be called with `workdir`.

    Raises:
        UserError: the settings do not fit the code.
    """
    paths, overrides = list(paths), list(overrides)
    settings = gin_files.settings(paths, overrides)
    checks.check_names(settings, [*configurables, "run"], gin_files.macros_of_package)
    chosen: Any = settings["", "run", "job"].value if ("", "run", "job") in settings else None
    if getattr(chosen, "evaluate", True):  # no reference at all, or one that is called at once
        raise UserError("No job is chosen: a gin file has to set run.job to a reference such as @train.")

    names = {reference.selector for setting in settings.values() for reference in checks.references(setting.value)}
    names |= {selector for _, selector, argument in settings if argument}
    gin.clear_config()
    targets = {"run": _run}
    for name in sorted(names & configurables.keys()):
        module, attribute = configurables[name].split(":")
        targets[name] = getattr(importlib.import_module(module), attribute)
    if "workdir" not in inspect.signature(targets.get(chosen.selector, _run)).parameters:
        place = settings["", "run", "job"].location
        raise UserError(f"{place}: run.job is {chosen!r}, which is no job; jobs are such as @promot and @compare.")
    for name, target in targets.items():
        _register(name, target, settings, is_job=name == chosen.selector)

    settings = gin_files.settings(paths, overrides)  # with references to what is now registered
    for setting in settings.values():
        _bind(setting, targets)
    gin.finalize()
    try:
        job: functools.partial[Any] = gin.get_configurable("run")()()
    except RecursionError:
        checks.check_circle(settings)
        raise
    checks.check_overrides(settings, list(gin_files.parse(gin.operative_config_str(), "operative configuration")))
    return job


def write(folder: Path) -> None:
    """Writes the configuration to `config.gin`, and the part of it that was used, with defaults, beside it."""
    (folder / "config.gin").write_text(gin.config_str(120), "utf-8")
    (folder / "operative_config.gin").write_text(gin.operative_config_str(120), "utf-8")


def _run(job: Callable[..., Any]) -> Callable[..., Any]:
    """What `run` means in a gin file: `run.job = @train` chooses the job."""
    return job


def _register(
    name: str, target: Callable[..., Any], settings: Mapping[checks.Key, gin_files.Statement], is_job: bool
) -> None:
    """Makes `target` known to gin. Its arguments are checked when gin calls it; a job only gets ready to be called."""

    def call(**arguments: Any) -> Any:
        called = checks.scoped(gin.current_scope_str(), name)
        arguments = checks.check_arguments(called, target, arguments, settings)
        try:
            return functools.partial(target, **arguments) if is_job else target(**arguments)
        except UserError as error:
            raise checks.explained(error, called, settings) from None

    call.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]  # where gin looks for defaults
    with gin_config.interactive_mode():  # so that names may be registered again in the same process
        gin.external_configurable(call, name=name, module="promot_jax")


def _bind(setting: gin_files.Statement, targets: Mapping[str, Callable[..., Any]]) -> None:
    """Gives one setting to gin; a `UserError` names the nearest parameter."""
    scope, selector, argument, value, place = setting
    if not argument:
        gin.bind_parameter((checks.scoped(scope, selector), "gin.macro", "value"), value)
        return
    if argument == "workdir":
        raise UserError(f"{place}: the workdir of a job is set with --workdir.")
    try:
        gin.bind_parameter((scope, selector, argument), value)
    except ValueError as error:
        hint = nearest(argument, inspect.signature(targets[selector]).parameters)
        raise UserError(f"{place}: {selector} has no parameter {argument!r}{hint}.") from error
