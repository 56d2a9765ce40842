"""The persistent compilation cache: where it lies, when it is off, and that another process reads what one compiled."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from promot_jax.distributed import compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
PROGRAM = """
import jax, jax.numpy as jnp
from promot_jax.distributed import compilation_cache
compilation_cache.LEAST_SECONDS = 0
compilation_cache.use()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(100.0))), bool(hits))
"""


@pytest.fixture(autouse=True)
def _settings_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(compilation_cache.VARIABLE)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder() -> str | None:
    found: str | None = jax.config.values["jax_compilation_cache_dir"]
    return found


def test_by_default_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation_cache.use()
    assert Path(folder() or "").parent == tmp_path / ".cache" / "promot_jax" / "compiled"
    assert jax.config.values["jax_compilation_cache_max_size"] == compilation_cache.MOST_BYTES


def test_it_is_off_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compilation_cache.VARIABLE, "off")
    compilation_cache.use()
    assert folder() is None


def test_a_cache_of_jax_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", "mine")
    compilation_cache.use()
    assert folder() == "mine"
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path))
    compilation_cache.use()
    assert Path(folder() or "").parent == tmp_path


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    compilation_cache.use()
    assert folder() is None
    assert f"Programs are compiled anew: {tmp_path}/file/cache/" in capsys.readouterr().err


def test_another_cpu_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here = compilation_cache._machine()
    monkeypatch.setattr(Path, "read_text", lambda *_: "model name: another\nflags: avx2\nMHz: 1\n")
    there = compilation_cache._machine()
    monkeypatch.setattr(Path, "read_text", lambda *_: "model name: another\nflags: avx2\nMHz: 2\n")
    assert here != there == compilation_cache._machine()


def test_a_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    environment = os.environ | {compilation_cache.VARIABLE: str(tmp_path)}
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout.split())
    assert printed[0][1] == "False" and printed[1] == [printed[0][0], "True"]
    assert done.stderr == ""


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX could store no program any more beside one without its time."""
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path))
    compilation_cache.use()
    place = Path(folder() or "")
    for name, age in (("old-cache", 3600), ("new-cache", 0), ("whole-cache", 3600), ("whole-atime", 3600)):
        (place / name).write_bytes(b"x")
        os.utime(place / name, (time.time() - age,) * 2)
    compilation_cache.use()
    assert sorted(path.name for path in place.iterdir()) == ["new-cache", "whole-atime", "whole-cache"]


@pytest.mark.parametrize("wanted", ["gs://bucket/cache", "~nobody-of-this-name/cache"])
def test_a_folder_that_cannot_be_is_named(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(compilation_cache.VARIABLE, wanted)
    compilation_cache.use()
    assert folder() is None and "cannot be written" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
