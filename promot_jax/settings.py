"""What gin files say, as plain records, and every check of it that needs no gin.

A wrong setting is one sentence before any work is done, instead of a traceback inside a run: names are checked before
anything is imported, arguments against the signature of what they are passed to, and the overrides of the command line
for having an effect.
"""

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from promot_jax.errors import UserError, nearest

_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # *args, **kwargs
Key = tuple[str, str, str]  # scope, name, parameter; ("", NAME, "") for a macro


class Reference(NamedTuple):
    """`@scope/name`, or `@scope/name()` when evaluated."""

    scope: str
    name: str
    evaluate: bool


class Macro(NamedTuple):
    """`%NAME`."""

    name: str


class Setting(NamedTuple):
    """`scope/name.parameter = value` or, with an empty parameter, a macro `NAME = value`."""

    scope: str
    name: str
    parameter: str
    value: Any
    place: str  # where it was written: file and line, or the flag
    is_override: bool  # from the command line

    @property
    def key(self) -> Key:
        """What a later setting of the same thing replaces."""
        return self[:3]

    def __str__(self) -> str:
        return scoped(self.scope, ".".join(filter(None, [self.name, self.parameter])))


Settings = Mapping[Key, Setting]


def scoped(scope: str, name: str) -> str:
    """Returns `scope/name`, or the name alone outside of any scope."""
    return f"{scope}/{name}" if scope else name


def mentions(value: Any) -> Iterator[Reference | Macro]:
    """Yields the references and macros in a value, however deep."""
    if isinstance(value, Reference | Macro):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from mentions(item)


def references(settings: Iterable[Setting]) -> list[Reference]:
    """Returns the references in the values of `settings`."""
    return [mention for setting in settings for mention in mentions(setting.value) if isinstance(mention, Reference)]


def macros_reached(users: Iterable[Setting], settings: Settings) -> dict[str, Setting]:
    """Returns the macros that `users` need, directly or through other macros, each with the setting that uses it."""
    reached: dict[str, Setting] = {}
    pending = list(users)
    while pending:
        user = pending.pop()
        for mention in mentions(user.value):
            if isinstance(mention, Macro) and mention.name not in reached:
                reached[mention.name] = user
                pending += [settings["", mention.name, ""]] if ("", mention.name, "") in settings else []
    return reached


def check_names(settings: Settings, known: Collection[str], macros_elsewhere: Callable[[], set[str]]) -> None:
    """Checks all names, importing nothing.

    Args:
        settings: all settings that hold.
        known: the names a setting may configure or refer to.
        macros_elsewhere: returns macros that a file may set although this run does not use them.

    Raises:
        UserError: an unknown name, a macro without a value, or a macro that nothing uses.
    """
    for setting in settings.values():
        for name in [reference.name for reference in references([setting])] + [setting.name] * bool(setting.parameter):
            if name not in known:
                raise UserError(f"{setting.place}: nothing is called {name!r}{nearest(name, known)}.")
        if setting.value == Macro("gin.REQUIRED"):
            raise UserError(f"{setting} has no value yet: add --gin.{setting}=VALUE.")

    macros = {setting.name: setting for setting in settings.values() if not setting.parameter}
    reached = macros_reached([setting for setting in settings.values() if setting.parameter], settings)
    for name in sorted(reached.keys() - macros.keys()):
        raise UserError(f"{reached[name].place}: {name} has no value{nearest(name, macros)}, add --gin.{name}=VALUE.")
    for name in sorted(macros.keys() - reached.keys()):
        # A file may serve other runs than this one; the command line speaks of this run only.
        elsewhere = set() if macros[name].is_override else macros_elsewhere()
        if name not in elsewhere:
            known = {*reached, *elsewhere}
            raise UserError(f"{macros[name].place}: nothing in this run uses the macro {name}{nearest(name, known)}.")


def check_overrides(settings: Settings, calls: Collection[tuple[str, str]]) -> None:
    """Checks that every override had an effect: one for a scope that nothing is called in has none.

    Args:
        settings: all settings that hold.
        calls: scope and name of everything that was called.

    Raises:
        UserError: an override changed nothing.
    """
    used: dict[Key, Setting] = {}
    for scope, name in calls:
        parts = scope.split("/") if scope else []
        for depth in range(len(parts) + 1):  # as gin does, an inner scope replaces what an outer one says
            outer = "/".join(parts[:depth])
            used |= {(scope, name, key[2]): setting for key, setting in settings.items() if key[:2] == (outer, name)}
    if any(not reference.evaluate for reference in references(s for s in used.values() if s.name != "run")):
        return  # the job got something to call later: what that uses is not known yet
    in_use = {setting.key for setting in used.values()} | {
        ("", name, "") for name in macros_reached(used.values(), settings)
    }
    for setting in settings.values():
        if setting.is_override and setting.key not in in_use:
            run = ", ".join(sorted(scoped(*call) for call in calls))
            raise UserError(f"{setting.place} changes nothing in this run, which is made of {run}.")


def check_parameter(setting: Setting, target: Callable[..., Any]) -> None:
    """Raises a `UserError` with the nearest name when `target` has no parameter of the setting's name."""
    parameters = inspect.signature(target).parameters
    if setting.parameter not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        hint = nearest(setting.parameter, parameters)
        raise UserError(f"{setting.place}: {setting.name} has no parameter {setting.parameter!r}{hint}.")


def check_arguments(
    name: str, target: Callable[..., Any], arguments: Mapping[str, Any], supplied_later: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the keyword arguments to call `target` with.

    Settings come as text, and a mistyped number arrives as a string.

    Args:
        name: what the settings call `target`, for the message.
        target: a function or a class.
        arguments: keyword arguments.
        supplied_later: required parameters that may be missing here.

    Raises:
        UserError: a required argument is missing, or one has the wrong type.
    """
    for parameter in inspect.signature(target).parameters.values():
        optional = parameter.default is not parameter.empty or parameter.kind in _STARRED
        if not optional and parameter.name not in arguments and parameter.name not in supplied_later:
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
            options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
            wanted = f"one of {', '.join(map(repr, options))}" if options else _in_words(hint)
            raise UserError(f"{name}.{key} has to be {wanted}, not {value!r}.")
    return checked


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Returns whether `value` fits a type hint, and what to pass on: a list becomes a tuple where one is asked for.

    Only numbers, strings, booleans, `None`, literals, tuples, sequences, mappings and unions of these are looked at;
    any other hint takes everything. An `int` fits `float`; a `bool` fits neither of them.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((result for option in options if (result := fit(value, option))[0]), (False, value))
    if origin is typing.Literal:
        return value in options, value
    if origin is tuple or hint is tuple:
        return isinstance(value, list | tuple), tuple(value) if isinstance(value, list) else value
    if origin is Sequence:  # a text is no sequence of texts
        return isinstance(value, list | tuple) and all(fit(item, options[0])[0] for item in value), value
    if origin is Mapping:
        return isinstance(value, dict) and all(fit(item, options[1])[0] for item in value.values()), value
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool), value
    if hint in (str, bool, types.NoneType):
        return isinstance(value, hint), value
    return True, value


def _in_words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
