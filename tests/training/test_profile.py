"""The profile of some updates: which are traced, whose time a loop's is, and the page."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from promot_jax.errors import UserError
from promot_jax.training import profile
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.profile import Operation, Profile
from promot_jax.training.settings import Training


@jax.jit
def _work(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ carry), None), x, None, length=3)[0]


def run(folder: Path, steps: tuple[int, ...], numbers: range, fail: int = 0) -> None:
    kept = Profile(folder, "stage2", steps)
    for number in numbers:
        with kept.step(number):
            _work(jnp.ones((32, 32))).block_until_ready()
            if number == fail:
                raise KeyboardInterrupt


def test_updates_are_traced_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _work(jnp.ones((32, 32)))
    run(tmp_path, (2, 3), range(1, 6))
    page = (tmp_path / "profile" / "summary.txt").read_text("utf-8")
    assert page.startswith("Updates 2 to 3 of stage stage2.\n")
    assert re.search(r"^ +[\d.]+ % +[\d.]+ s +1 x  while", page, re.MULTILINE)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert page.endswith(f"Trace: {trace.parent}\n") and len(page.splitlines()) < 70
    assert "[stage2] profile of updates up to 3" in capsys.readouterr().out


def test_no_profile_leaves_nothing(tmp_path: Path) -> None:
    run(tmp_path, (), range(1, 4))
    run(tmp_path, (1, 2), range(3, 5))  # a resumed run that is past them
    assert not [*tmp_path.iterdir()]


def test_a_resumed_run_profiles_the_rest(tmp_path: Path) -> None:
    run(tmp_path, (2, 4), range(4, 6))
    assert (tmp_path / "profile" / "summary.txt").read_text("utf-8").startswith("Updates 4 to 4 ")


def test_an_update_that_fails_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, (1, 2), range(1, 3), fail=1)
    assert not (tmp_path / "profile" / "summary.txt").exists()
    run(tmp_path, (1, 1), range(1, 2))  # another trace can start


def test_self_time() -> None:
    thread = [
        Operation("while.1", 0.0, 10.0),
        Operation("dot.2", 1.0, 4.0),
        Operation("while.3", 4.0, 9.0),
        Operation("dot.2", 5.0, 7.0),
        Operation("copy", 10.0, 11.0),
    ]
    assert profile.self_seconds(reversed(thread)) == {
        "while.1": (2.0, 1), "dot.2": (5.0, 2), "while.3": (3.0, 1), "copy": (1.0, 1)
    }  # fmt: skip
    page = profile.summary("Updates 1 to 2", [5.0, 7.0], 0.5, [thread, [Operation("dot.4", 0.0, 9.0)]])
    rows = [" ".join(line.split()) for line in page.splitlines()]
    assert "seconds per update 6.000 (5.000 to 7.000)" in rows
    assert "between two updates 0.500 (next batch, progress lines)" in rows
    assert "70.0 % 7.0000 s 1.5 x dot" in rows and "25.0 % 2.5000 s 1 x dot.2" in rows


def test_no_operation_is_said() -> None:
    assert "none: no operation was recorded" in profile.summary("Nothing", [1.0], 0.0, [])


@pytest.mark.parametrize("steps", [(1,), (0, 1), (3, 2), (4, 6), (1, 2, 3)])
def test_updates_that_are_not_there_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"the updates 1 to 5 to profile"):
        Training(5, 2, 1, Optimizer(), profile=steps)
    assert Training(5, 2, 1, Optimizer(), profile=(1, 5)).profile == (1, 5)
