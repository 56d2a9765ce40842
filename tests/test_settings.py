"""Settings as plain records: what fits a type, what is reached, what had an effect."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax import main, settings
from promot_jax.errors import UserError
from promot_jax.settings import Macro, Reference, Setting


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
    ],
)
def test_fit(value: object, hint: object, fits: bool) -> None:
    assert settings.fit(value, hint) == (fits, value)


def test_fit_makes_tuples() -> None:
    assert settings.fit([1, 2], tuple[int, ...]) == (True, (1, 2))
    assert settings.fit([1, 2], tuple[int, ...] | None) == (True, (1, 2))
    assert settings.fit([1, 2], list[int]) == (True, [1, 2])


def test_mentions_are_found_in_containers() -> None:
    reference, macro = Reference("a", "B", True), Macro("C")
    assert list(settings.mentions({"k": [(reference,)], macro: 3})) == [macro, reference]


def test_macros_are_reached_through_macros_and_loops_end() -> None:
    job = Setting("", "train", "task", [Macro("A")], "file line 1", False)
    a = Setting("", "A", "", Macro("B"), "file line 2", False)
    b = Setting("", "B", "", Macro("A"), "file line 3", False)
    assert settings.macros_reached([job], {s.key: s for s in (job, a, b)}) == {"A": job, "B": a}


def override(scope: str, rate: float) -> Setting:
    """A setting of the command line."""
    return Setting(scope, "Optimizer", "rate", rate, f"--gin.{scope}/Optimizer.rate", True)


def test_override_of_an_outer_scope_has_no_effect_under_an_inner_one() -> None:
    run = Setting("", "run", "job", Reference("", "train", False), "file line 1", False)
    inner = Setting("first", "Optimizer", "rate", 0.1, "file line 2", False)
    everything = {s.key: s for s in (run, inner, override("", 0.3))}
    settings.check_overrides(everything, {("", "run"), ("first", "Optimizer"), ("second", "Optimizer")})
    with pytest.raises(UserError, match="changes nothing in this run, which is made of first/Optimizer, run"):
        settings.check_overrides(everything, {("", "run"), ("first", "Optimizer")})


def test_override_for_something_called_later_is_believed() -> None:
    run = Setting("", "run", "job", Reference("", "train", False), "file line 1", False)
    later = Setting("", "train", "optimizer", Reference("", "Optimizer", False), "file line 2", False)
    everything = {s.key: s for s in (run, later, override("", 0.3))}
    settings.check_overrides(everything, {("", "run"), ("", "train")})


@given(st.text())
def test_every_text_can_be_given_quoted(text: str) -> None:
    assert main.read_override("NAME", repr(text)).value == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="([{'\"@%#\\0123456789-")))
def test_other_text_is_taken_as_it_is(text: str) -> None:
    value = main.read_override("NAME", text).value
    assert value == text or str(value) == text.strip()  # True, None
