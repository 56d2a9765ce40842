"""Pairs of sides: their order, their statistics, races of variants, and what ends a benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.harness import Case, FailedError, Ratio, Side


class Script:
    """Runs nothing: returns the next of the values that are given for a function, and notes the calls."""

    def __init__(self, **values: list[float]):
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self._values = {name: iter(numbers) for name, numbers in values.items()}

    def __call__(self, function: str, settings: Mapping[str, Any]) -> dict[str, float]:
        self.calls.append((function, settings))
        if settings.get("fail"):
            raise FailedError("it failed")
        return {"seconds": next(self._values[function])}


RATIOS = (Ratio("time", "seconds", "ours", "theirs"), Ratio("alone", "seconds", "ours"))


def case(**options: Any) -> Case:
    return Case("step", (Side("ours", "a", {"rows": 8}), Side("theirs", "b", {})), RATIOS, **options)


def test_sides_alternate_and_ratios_are_medians_within_pairs() -> None:
    run = Script(a=[1.0, 4.0, 3.0], b=[2.0, 2.0, 2.0])
    found = harness.measure(case(), 3, run)
    assert [name for name, _ in run.calls] == ["a", "b", "b", "a", "a", "b"]
    assert found["ratios"] == {"time": 1.5, "alone": 3.0}
    assert found["ranges"] == {"time": [0.5, 2.0], "alone": [1.0, 4.0]}
    assert found["sides"]["ours"]["seconds"] == {"median": 3.0, "low": 1.0, "high": 4.0, "values": [1.0, 4.0, 3.0]}
    assert run.calls[0][1] == {"rows": 8} and found["variants"] == {}


def test_the_fastest_variant_runs_in_the_pairs() -> None:
    variants = {"batches of 8": {"batch": 8}, "batches of 16": {"batch": 16}}
    raced = Case("generation", (Side("ours", "a", {}), Side("theirs", "b", {"beams": 4}, variants)), RATIOS[:1])
    run = Script(a=[1.0], b=[5.0, 4.0, 2.0])
    found = harness.measure(raced, 1, run)
    assert found["variants"] == {
        "theirs": {"chosen": "batches of 16", "race": {"batches of 8": 5.0, "batches of 16": 4.0}}
    }
    assert run.calls[-1] == ("b", {"beams": 4, "batch": 16})
    assert found["ratios"] == {"time": 0.5}


def test_a_race_may_have_less_work_than_the_pairs() -> None:
    variants = {"batches of 8": {"batch": 8}, "batches of 16": {"batch": 16}}
    theirs = Side("theirs", "b", {"every": 1}, variants, race={"every": 4})
    run = Script(a=[1.0], b=[5.0, 4.0, 2.0])
    harness.measure(Case("generation", (Side("ours", "a", {}), theirs), RATIOS[:1]), 1, run)
    of_theirs = [settings for name, settings in run.calls if name == "b"]
    assert of_theirs == [{"every": 4, "batch": 8}, {"every": 4, "batch": 16}, {"every": 1, "batch": 16}]


def test_an_optional_variant_may_fail_and_the_reason_is_kept() -> None:
    variants = {"as it is": {}, "compiled": {"fail": True}}
    ours, theirs = Side("ours", "a", {}), Side("theirs", "b", {}, variants, optional=True)
    found = harness.measure(Case("step", (ours, theirs), ()), 1, Script(a=[1.0], b=[5.0, 5.0]))
    assert found["variants"]["theirs"] == {"chosen": "as it is", "race": {"as it is": 5.0, "compiled": "it failed"}}
    with pytest.raises(FailedError, match="it failed"):
        harness.measure(Case("step", (Side("theirs", "b", {}, variants),), ()), 1, Script(b=[5.0, 5.0]))
    neither = Side("theirs", "b", {}, {"x": {"fail": True}, "y": {"fail": True}}, optional=True)
    with pytest.raises(FailedError, match="No variant ran"):
        harness.measure(Case("step", (neither,), ()), 1, Script())


def test_sides_that_do_other_work_are_refused() -> None:
    def run(function: str, settings: Mapping[str, Any]) -> dict[str, float]:
        return {"seconds": 1.0, "loss": 3.0 if function == "a" else 3.1}

    harness.measure(case(agree="loss", tolerance=0.05), 1, run)
    with pytest.raises(FailedError, match="step differ in loss"):
        harness.measure(case(agree="loss", tolerance=0.01), 1, run)


def test_warm_up_and_fewer_pairs() -> None:
    run = Script(a=[9.0, 1.0], b=[2.0])
    assert harness.measure(case(warm_up=("ours",), pairs=1), 5, run)["ratios"]["time"] == 0.5
    assert [name for name, _ in run.calls] == ["a", "a", "b"]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("stand_ins")
def test_a_process_returns_measures_and_its_wall_clock() -> None:
    measures = harness.run_process("stand_in:work", {"seconds": 0.2})
    assert measures["seconds"] == 0.2 and 0.2 < measures["wall_seconds"] < 30


@pytest.mark.usefixtures("stand_ins")
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(FailedError, match=r"(?s)stand_in:work ended with status 1:.*no compiler here"):
        harness.run_process("stand_in:work", {"fail": True})
