"""Leases on folders: one owner at a time, whatever dies."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import processes
import pytest

from promot_jax.distributed import preemption
from promot_jax.errors import TakenOverError, UserError
from promot_jax.sweep import leases


def foreign(folder: Path, number: int = 0, age: float = 0.0, **lease: object) -> Path:
    """A lease of another machine, touched `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lease.{number}"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process": "x", "started": "", **lease}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_lease_is_held_once_and_released(tmp_path: Path) -> None:
    with leases.hold(tmp_path / "cell", 60) as first, leases.hold(tmp_path / "cell", 60) as second:
        assert (first, second) == (True, False)
        assert leases.owner(tmp_path / "cell", 60) == f"{socket.gethostname()}, process {os.getpid()}"
    assert not list((tmp_path / "cell").iterdir()) and leases.owner(tmp_path / "cell", 60) == ""


@pytest.mark.parametrize("age", [0, 70])
def test_a_lease_by_its_earlier_name_counts(tmp_path: Path, age: int) -> None:
    foreign(tmp_path, age=age).rename(tmp_path / "claim.0")
    with leases.hold(tmp_path, 60) as held:
        assert held == bool(age)
    assert [path.name for path in tmp_path.iterdir()] == ([] if age else ["claim.0"])


def test_a_lease_is_released_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), leases.hold(tmp_path, 60):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_living_lease_of_another_machine_is_respected(tmp_path: Path) -> None:
    path = foreign(tmp_path, age=50)
    assert leases.owner(tmp_path, 60) == "elsewhere, process 1"
    with leases.hold(tmp_path, 60) as held:
        assert not held
    assert path.exists()


@pytest.mark.parametrize("empty", [False, True])
def test_a_lease_without_a_sign_of_life_is_taken_over(tmp_path: Path, empty: bool) -> None:
    path = foreign(tmp_path, age=70)
    if empty:  # its owner died while it wrote
        path.write_text("")
        os.utime(path, (time.time() - 70,) * 2)
    assert leases.owner(tmp_path, 60) == ""
    with leases.hold(tmp_path, 60) as held:
        assert held and (tmp_path / "lease.1").exists()
    assert not list(tmp_path.iterdir())


def test_a_process_of_this_machine_that_is_gone_is_no_owner(tmp_path: Path) -> None:
    gone = processes.start([sys.executable, "-c", ""])
    gone.wait()
    with leases.hold(tmp_path / "a", 60):
        lease = json.loads((tmp_path / "a" / "lease.0").read_text())
    foreign(tmp_path / "a", **lease | {"process": "x", "pid": gone.pid})
    foreign(tmp_path / "b", **lease | {"process": "x", "pid": os.getpid()})  # a predecessor
    foreign(tmp_path / "c", **lease | {"process": "x", "pid": os.getppid()})
    # In another container of the same name, or before the machine was started anew, the number says nothing.
    foreign(tmp_path / "d", **lease | {"process": "x", "pid": gone.pid, "pid_namespace": "pid:[1]"})
    foreign(tmp_path / "e", **lease | {"process": "x", "pid": os.getpid(), "boot": "another"})
    assert [bool(leases.owner(tmp_path / name, 60)) for name in "abcde"] == [False, False, True, True, True]
    foreign(tmp_path / "d", age=70, **lease | {"process": "x", "pid": gone.pid, "pid_namespace": "pid:[1]"})
    assert leases.owner(tmp_path / "d", 60) == ""


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"host": "a", "pid": "1"}', '{"host": "a", "pid": 1e3', "\x00", "[" * 99999]
)
def test_an_unreadable_lease_counts_until_it_is_stale(tmp_path: Path, text: str) -> None:
    path = foreign(tmp_path)
    path.write_text(text)
    assert leases.owner(tmp_path, 60) == "a process that has just begun"
    os.utime(path, (time.time() - 70,) * 2)
    with leases.hold(tmp_path, 60) as held:
        assert held
    assert not list(tmp_path.iterdir())


def test_a_lease_is_kept_alive(tmp_path: Path) -> None:
    with leases.hold(tmp_path, 0.2):
        before = (tmp_path / "lease.0").stat().st_mtime
        os.utime(tmp_path / "lease.0", (before - 100,) * 2)
        deadline = time.monotonic() + 10
        while (tmp_path / "lease.0").stat().st_mtime < before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("others", ["took it over", "gave it back", "gave it back and took it anew"])
def test_an_owner_that_was_taken_for_dead_ends(tmp_path: Path, others: str) -> None:
    """Also where SIGINT is ignored, as POSIX has it for `nohup` and background jobs: a signal would never come."""
    left: list[Path] = []

    def work() -> None:
        with leases.hold(tmp_path, 0.2) as held:
            assert held
            if "took" in others:  # all at once: this one looks every few milliseconds
                left.append(tmp_path / ("lease.0" if "anew" in others else "lease.1"))
                os.replace(foreign(tmp_path / "elsewhere", age=-100), left[0])
                (tmp_path / "elsewhere").rmdir()
            else:
                (tmp_path / "lease.0").unlink()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                preemption.check("here")
                time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(TakenOverError, match="saves nothing there"):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    preemption.check("afterwards")
    assert list(tmp_path.iterdir()) == left  # the other one's stays
    assert all(path.stat().st_mtime > time.time() + 50 for path in left)  # nor was it touched


def test_a_folder_leased_anew_meanwhile_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path, age=70)
    create = os.open

    def slow(path: str | Path, *arguments: int) -> int:
        if Path(path).name == "lease.1":  # another process took the expired lease over, ended, and a third one came
            foreign(tmp_path)
        return create(path, *arguments)

    monkeypatch.setattr(leases.os, "open", slow)
    with leases.hold(tmp_path, 60) as held:
        assert not held
    assert [path.name for path in tmp_path.iterdir()] == ["lease.0"]


COMPETE = """
import sys, time
from pathlib import Path
from promot_jax.sweep import leases
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
with leases.hold(Path(sys.argv[1]), 60) as held:
    print(int(held), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("stale", [False, True])
def test_only_one_of_many_gets_it(tmp_path: Path, stale: bool) -> None:
    if stale:
        foreign(tmp_path, age=100)
    command = [sys.executable, "-c", COMPETE, str(tmp_path), str(time.time() + 0.5)]
    several = [processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    got = [one.stdout.readline() for one in several if one.stdout]  # all hold what they got until they are told
    for one in several:
        one.communicate()
    assert sorted(got) == ["0\n"] * 3 + ["1\n"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot take a lease"), leases.hold(tmp_path / "file" / "cell", 60):
        pass


def test_a_full_disk_is_no_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(leases, "_take", full)
    with pytest.raises(OSError, match="No space left"), leases.hold(tmp_path / "cell", 60):
        pass


def test_a_lease_lasts_as_long_as_its_owner_says(tmp_path: Path) -> None:
    """Its owner touches it ten times in the time that it gave itself: a shorter one elsewhere must not take it over."""
    foreign(tmp_path, age=70, stale=600.0)
    assert leases.owner(tmp_path, 60) == "elsewhere, process 1"
    foreign(tmp_path, age=700, stale=600.0)
    assert leases.owner(tmp_path, 60) == ""


def test_a_folder_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def work() -> None:
        with leases.hold(folder, 0.2):
            shutil.rmtree(folder)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                preemption.check("here")
                time.sleep(0.01)

    with pytest.raises(TakenOverError, match=r"in .*run is gone, as when that folder was deleted; so this"):
        work()
    assert not folder.exists()


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    with leases.alone(tmp_path), pytest.raises(UserError, match=f"in use by .*, process {os.getpid()}: stop it"):
        leases.alone(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alive", [False, True])
def test_an_owner_that_cannot_be_seen_is_waited_for(tmp_path: Path, alive: bool, monkeypatch: Any) -> None:
    """The container that was killed had the lease; a living one touches it."""
    path = foreign(tmp_path, age=59)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
            os.utime(path, None if alive else (time.time() - 61,) * 2)

    monkeypatch.setattr(leases.time, "sleep", sleep)
    with contextlib.ExitStack() as stack:
        if alive:
            with pytest.raises(UserError, match="in use by elsewhere, process 1"):
                stack.enter_context(leases.alone(tmp_path))
        else:
            stack.enter_context(leases.alone(tmp_path))
    assert waits == [1.0] and path.exists() == alive
