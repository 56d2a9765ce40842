"""What a gin file says: what fits a type, which names are known and used, what had an effect."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.config import checks, gin_files
from promot_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class A:
    """A setting."""


@dataclasses.dataclass(frozen=True)
class B:
    """Another."""


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, int, True),
        (3, float, True),
        (3.0, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        ("3", int, False),
        (3, str, False),
        (None, int, False),
        (None, int | None, True),
        ("x", str | None, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (3, tuple[int, ...], False),
        ({"a": 1}, dict[str, int], True),
        ("anything", Sequence[str], False),
        (["a"], Sequence[str], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "1"}, Mapping[str, int], False),
        (object(), Any, True),
        (A(), A, True),
        (A(), B, False),
        (3, A | None, False),
        (A(), A | B | None, True),
        (len, Callable[..., Any], True),
    ],
)
def test_fit(value: object, hint: object, fits: bool) -> None:
    assert checks.fit(value, hint) == (fits, value)


def test_fit_makes_tuples() -> None:
    assert checks.fit([1, 2], tuple[int, ...]) == (True, (1, 2))
    assert checks.fit([1, 2], tuple[int, ...] | None) == (True, (1, 2))
    assert checks.fit([1, 2], list[int]) == (True, [1, 2])


def settings(*lines: str, **overrides: str) -> dict[tuple[str, str, str], Any]:
    """The statements of a gin file, by scope, selector and argument."""
    parsed = gin_files.parse("\n".join(lines), "a.gin")
    statements = [statement for statement in parsed if hasattr(statement, "value")]  # and no heads of blocks
    statements += [gin_files.read_override(name, text) for name, text in overrides.items()]
    return {statement[:3]: statement for statement in statements}


def test_references_are_found_in_containers() -> None:
    value = settings("A = {'k': [(@s/B(),)], %C: 3, 'x': @D}")["", "A", ""].value
    found = [(reference.selector, reference.evaluate) for reference in checks.references(value)]
    assert found == [("gin.macro", True), ("B", True), ("D", False)]
    assert checks.macros(value) == [("", "C", "")]
    assert checks.macros(settings("A = [%s/C]")["", "A", ""].value) == [("s", "C", "")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train.x = %A", "A = %B", "B = [%C]"], "a.gin line 3: C has no value"),
        (
            ["train.x = %A", "A = %B", "B = {%A: 1}"],
            "a.gin line 2: these settings refer to each other in a circle: A -> B -> A.",
        ),
        (["train.x = {%A: [%s/C]}", "A = 1", "C = 2"], r"a.gin line 1: s/C has no value \(did you mean 'C'\?\)"),
        (["train.x = %A", "A = [%gin.REQUIRED]"], "A has no value yet: add --gin.A=VALUE."),
        (["train.x = @gin.singleton()"], r"a.gin line 1: nothing is called 'gin.singleton' \(did you mean"),
        (["train.x = 1", "train:", "    y = @Optimizre()"], "a.gin line 3: nothing is called 'Optimizre'"),
        (["s/A = 1"], "a.gin line 1: nothing in this run uses the macro s/A."),
    ],
)
def test_mistakes_in_names(lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checks.check_names(settings(*lines), ["train", "Optimizer", "single"], set)


def test_names_that_are_right() -> None:
    lines = ["train.x = {%A: [%s/C, @o/Optimizer()]}", "A = 1", "s/C = %A", "D = 'used by another run'"]
    checks.check_names(settings(*lines), ["train", "Optimizer"], lambda: {"D"})


def operative(*lines: str) -> list[Any]:
    """What gin says of a run in which these arguments and macros were used."""
    return list(settings("run.job = @train", *lines).values())


def test_override_of_an_outer_scope_has_no_effect_under_an_inner_one() -> None:
    everything = settings("run.job = @train", "first/Optimizer.rate = 0.1", **{"Optimizer.rate": "0.3"})
    checks.check_overrides(everything, operative("first/Optimizer.rate = 0.1", "a/second/Optimizer.rate = 0.3"))
    with pytest.raises(UserError, match="changes nothing in this run, which is made of first/Optimizer, run"):
        checks.check_overrides(everything, operative("first/Optimizer.rate = 0.1"))


def test_override_of_a_macro_that_was_not_used_has_no_effect() -> None:
    everything = settings("train.x = 3", "A = %B", B="2")
    checks.check_overrides(everything, operative("train.x = 3", "A = %B", "B = 2"))
    with pytest.raises(UserError, match=r"--gin\.B changes nothing"):
        checks.check_overrides(everything, operative("train.x = 3"))


def test_override_for_something_called_later_is_believed() -> None:
    everything = settings("run.job = @train", "train.optimizer = @Optimizer", **{"Optimizer.rate": "0.3"})
    checks.check_overrides(everything, operative("train.optimizer = @Optimizer"))


@given(st.text())
def test_every_text_can_be_given_quoted(text: str) -> None:
    assert gin_files.read_override("NAME", repr(text)).value == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="([{'\"@%#\\0123456789-")))
def test_other_text_is_taken_as_it_is(text: str) -> None:
    value = gin_files.read_override("NAME", text).value
    assert value == text or str(value) == text.strip()  # True, None


@pytest.mark.parametrize("text", ["True\nx", "3\nA = 4", "1 2", "x = 3", "include 'a.gin'", "A:\n  b = 1"])
def test_only_a_whole_value_is_a_value(text: str) -> None:
    assert gin_files.read_override("NAME", text).value == text
