"""Checks of what gin files say: one error message per mistake, before any work is done.

gin itself accepts a macro that nothing uses, an override without effect and a value of the wrong type, and suggests no
names. Here names are checked before anything is imported, arguments against the type hints of what they are passed to
(by msgspec), and overrides for having an effect. Statements and references are gin's own.
"""

import dataclasses
import graphlib
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from promot_jax.config.gin_files import Statement, is_override
from promot_jax.errors import UserError, half_character, nearest

_MACRO, _CONSTANT = "gin.macro", "gin.constant"  # what gin makes of %NAME and of %gin.REQUIRED
LIMIT = 2**32  # of all whole numbers
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}
_PLURAL = {"an integer": "integers", "a number": "numbers", "a text": "texts"}
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


def check_circle(settings: Mapping[Key, Statement]) -> None:
    """Raises `UserError` with `A -> B -> A` for names that refer to each other in a circle."""
    graph: dict[str, dict[str, str]] = {}  # by name, what it refers to, and where
    for key, setting in settings.items():
        called = [reference.selector for reference in references(setting.value) if reference.evaluate]
        names = [*map(written, macros(setting.value)), *(name for name in called if name != _MACRO)]
        graph.setdefault(key[1] if key[2] else written(key), {}).update(dict.fromkeys(names, setting.location))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        names = error.args[1][::-1]
        place, circle = graph[names[0]][names[1]], " -> ".join(names)
        raise UserError(f"{place}: these settings refer to each other in a circle: {circle}.") from None


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

    check_circle({key: setting for key, setting in settings.items() if key in values})
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


def typed(settings: Mapping[Key, Statement], scope: str, selector: str, argument: str) -> tuple[str, str, str]:
    """Returns how a user wrote an argument: the name, the value as text, and in brackets the file, "" for a flag.

    The innermost scope counts. What a macro sets goes by the macro: `TRAIN_STEPS`, not `model/Training.steps`.
    """
    scopes = ["", *itertools.accumulate(scope.split("/"), scoped)] if scope else [""]
    key = next(((s, selector, argument) for s in reversed(scopes) if (s, selector, argument) in settings), None)
    if key is None:
        return written((scope, selector, argument)), "", ""
    while getattr(settings[key].value, "selector", "") == _MACRO:
        key = macros(settings[key].value)[0]
    place = settings[key].location
    return written(key), repr(settings[key].value), "" if is_override(settings[key]) else f" ({place})"


def check_arguments(
    name: str, target: Callable[..., Any], arguments: Mapping[str, Any], settings: Mapping[Key, Statement] | None = None
) -> dict[str, Any]:
    """Returns the keyword arguments to call `target` with; a mistyped number arrives here as a string.

    Args:
        name: what the settings call `target`, with its scope.
        target: a function or a class.
        arguments: keyword arguments; `workdir` may be missing, a job gets it later.
        settings: all settings that hold, to name those that the user wrote.

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
    scope, _, selector = name.rpartition("/")
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        fits, checked[key] = fit(value, hint)
        if problem := (out_of_range(value) or ("" if fits else f"has to be {in_words(hint)}")):
            label, shown, place = typed(settings or {}, scope, selector, key)
            raise UserError(f"{label} {problem}, not {shown or repr(value)}{place}.")
    return checked


def explained(error: UserError, name: str, settings: Mapping[Key, Statement]) -> UserError:
    """Returns the error of building what the settings call `name`, with what the user wrote for the arguments in it."""
    scope, _, selector = name.rpartition("/")
    message = str(error)
    arguments = {key[2] for key in settings if key[1] == selector and re.search(rf"\b{key[2]}\b", message)}
    known = (typed(settings, scope, selector, argument) for argument in sorted(arguments, key=message.index))
    shown = [f"{label} = {value}{place}" for label, value, place in known if label not in message and value]
    return UserError(f"{message.removesuffix('.')} ({', '.join(shown)})." if shown else message)


def out_of_range(value: Any) -> str:
    """Returns what is wrong with a number or text that nothing can hold or use; "" for a good one, or a container."""
    if isinstance(value, dict | list | tuple):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(out_of_range, items)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "has to be finite"
    if isinstance(value, int) and abs(value) >= LIMIT:  # JAX keeps 32 bits of a seed: 2**32 would be the seed 0
        return f"has to stay below {LIMIT} in size"
    if isinstance(value, str) and ("\0" in value or half_character(value)):
        return "has to be text in UTF-8 without the character of code 0"
    return ""


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Returns whether `value` fits a type hint, and what to pass on: a list becomes a tuple where one is asked for."""
    try:
        converted = msgspec.convert(value, hint)
    except (msgspec.ValidationError, UnicodeError):
        return False, value
    except TypeError:  # msgspec does not know this hint, such as a union of two dataclasses
        return True, value
    return True, converted if isinstance(converted, tuple) else value


def in_words(hint: Any) -> str:
    """Returns a type hint as a reader of gin files knows it: `an integer or None`, `one of 'a', 'b'`, `a mapping`."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if origin in _WORDS:
        return _WORDS[origin]
    if dataclasses.is_dataclass(origin):
        return f"@{getattr(origin, '__name__', origin)}()"
    kind = "a mapping" if isinstance(origin, type) and issubclass(origin, Mapping) else "a list"
    of = _PLURAL.get(in_words(inner[kind == "a mapping"])) if inner else None
    return f"{kind} of {of}" if of else kind
