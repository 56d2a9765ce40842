"""Checks of what gin files say: one error message per mistake, before any work is done.

gin itself accepts a macro that nothing uses, an override without effect and a value of the wrong type, and suggests no
names. Here names are checked before anything is imported, arguments against the type hints of what they are passed to
(by msgspec), and overrides for having an effect. Statements and references are gin's own.
"""

import graphlib
import inspect
import itertools
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from promot_jax.config.gin_files import Statement, is_override
from promot_jax.errors import UserError, nearest

_MACRO, _CONSTANT = "gin.macro", "gin.constant"  # what gin makes of %NAME and of %gin.REQUIRED
Key = tuple[str, str, str]  # scope, selector, argument: ("", NAME, "") for a macro


def scoped(scope: str, name: str) -> str:
    """Returns `scope/name`, or the name alone outside of any scope."""
    return f"{scope}/{name}" if scope else name


def written(key: Key) -> str:
    """Returns a key as a gin file has it: `scope/Name.argument`, or the name of a macro."""
    return scoped(key[0], ".".join(filter(None, key[1:])))


def references(value: Any) -> Iterator[Any]:
    """Yields gin's references in a value, macros among them; gin's own search leaves out the keys of dictionaries."""
    if isinstance(value, dict | list | tuple):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from references(item)
    elif hasattr(value, "evaluate"):
        yield value


def macros(value: Any) -> list[Key]:
    """Returns the keys of the macros in a value."""
    paths = [reference.scopes for reference in references(value) if reference.selector == _MACRO]
    return [("/".join(scopes), name, "") for *scopes, name in paths]


def check_names(
    settings: Mapping[Key, Statement], known: Collection[str], macros_elsewhere: Callable[[], set[str]]
) -> None:
    """Checks the names of all settings, importing nothing.

    Settings may configure and refer to `known` names. A file may set `macros_elsewhere` that this run does not use.

    Raises:
        UserError: an unknown name, a macro without a value or defined by itself, or one that nothing uses.
    """
    values = {key for key in settings if not key[2]}
    for key, setting in settings.items():
        selectors = [reference.selector for reference in references(setting.value)]
        for name in [*selectors, setting.selector] if setting.arg_name else selectors:
            if name not in (*known, _MACRO, _CONSTANT):
                raise UserError(f"{setting.location}: nothing is called {name!r}{nearest(name, known)}.")
        if _CONSTANT in selectors:
            raise UserError(f"{written(key)} has no value yet: add --gin.{written(key)}=VALUE.")
        for name in map(written, {*macros(setting.value)} - values):
            hint = nearest(name, map(written, values))
            raise UserError(f"{setting.location}: {name} has no value{hint}, add --gin.{name}=VALUE.")

    try:
        graphlib.TopologicalSorter({key: macros(setting.value) for key, setting in settings.items()}).prepare()
    except graphlib.CycleError as error:
        key = error.args[1][0]
        raise UserError(f"{settings[key].location}: the macro {written(key)} is defined by itself.") from error
    used = {key for setting in settings.values() for key in macros(setting.value)}
    for key in sorted(values - used):
        # A file may serve other runs than this one; the command line speaks of this run only.
        elsewhere = set() if is_override(settings[key]) else macros_elsewhere()
        if written(key) not in elsewhere:
            hint = nearest(written(key), {*map(written, used), *elsewhere})
            raise UserError(f"{settings[key].location}: nothing in this run uses the macro {written(key)}{hint}.")


def check_overrides(settings: Mapping[Key, Statement], operative: Collection[Statement]) -> None:
    """Raises `UserError` for an override without effect: one for a scope that nothing is called in has none.

    `operative` is gin's operative configuration: the arguments and macros of everything that was called.
    """
    passed_on = [item for statement in operative if statement.selector != "run" for item in references(statement.value)]
    if any(not reference.evaluate for reference in passed_on):
        return  # the job got something to call later: what that uses is not known yet
    in_use = set()
    for scope, name, argument, *_ in operative:
        scopes = ["", *itertools.accumulate(scope.split("/"), scoped)]
        # As gin does, an inner scope replaces what an outer one says.
        in_use |= {next(((s, name, argument) for s in reversed(scopes) if (s, name, argument) in settings), None)}
    for key, setting in settings.items():
        if is_override(setting) and key not in in_use:
            run = ", ".join(sorted({scoped(call.scope, call.selector) for call in operative if call.arg_name}))
            raise UserError(f"{setting.location} changes nothing in this run, which is made of {run}.")


def check_arguments(name: str, target: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments to call `target` with; a mistyped number arrives here as a string.

    Args:
        name: what the settings call `target`, for the message.
        target: a function or a class.
        arguments: keyword arguments; `workdir` may be missing, a job gets it later.

    Raises:
        UserError: a required argument is missing, or one has the wrong type.
    """
    for parameter in inspect.signature(target).parameters.values():
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        if not optional and parameter.name not in (*arguments, "workdir"):
            raise UserError(f"{name} needs a value for {parameter.name!r}: set {name}.{parameter.name}.")
    try:
        hints = typing.get_type_hints(target)
    except NameError:  # a type that is imported for type checkers only
        hints = {}
    checked = {}
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        fits, checked[key] = fit(value, hint)
        if not fits:
            raise UserError(f"{name}.{key} has to be {_in_words(hint)}, not {value!r}.")
    return checked


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Returns whether `value` fits a type hint, and what to pass on: a list becomes a tuple where one is asked for."""
    try:
        converted = msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False, value
    except TypeError:  # msgspec does not know this hint, such as a union of two dataclasses
        return True, value
    return True, converted if isinstance(converted, tuple) else value


def _in_words(hint: Any) -> str:
    """Returns `int`, `str | None` or `one of 'a', 'b'`."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
