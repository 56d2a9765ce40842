"""Leases on folders: which process works on a cell, through files that several machines share.

A lease is the file `lease.<n>` in the folder, created exclusively; its owner touches it regularly. A lease that was not
touched for long has a dead owner. Whoever creates `lease.<n + 1>` takes the folder over, again exclusively. An owner
that was merely stopped finds, when it continues, that the highest lease is not its own, and ends (`preemption.lost`).

This needs a file system with exclusive creation, such as local disks, NFS and Lustre; a mounted bucket may lack it.
Locks of the package `filelock` (4.3) do not serve: its lease expires only for a process that watched it for that long,
so that a new process cannot take over at once what died yesterday, and all processes must agree on the duration.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promot_jax import files
from promot_jax.distributed import preemption
from promot_jax.errors import UserError

STALE = 60.0  # seconds after which the lease on a run's folder has expired
_PROCESS = uuid.uuid4().hex  # a process id alone may be that of a predecessor


def owner(folder: Path, stale: float) -> str:
    """Returns the owner of a folder's lease, as "host, process 12", or "" if there is none.

    Args:
        folder: need not exist.
        stale: seconds without a touch after which a lease has expired. That of a process of this machine that is gone
            expires at once, unless it ran in another container.
    """
    numbers = _numbers(folder)
    return _living_owner(folder, numbers[-1], stale) if numbers else ""


@contextlib.contextmanager
def hold(folder: Path, stale: float) -> Iterator[bool]:
    """Holds the lease on a folder during a `with` block, if no other process has it.

    Args:
        folder: made if needed.
        stale: as in `owner`; the lease is touched ten times as often.

    Yields:
        Whether this process has the lease. If so, check again whether there is work left.

    Raises:
        UserError: the folder cannot be written to.
        OSError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _take(folder, stale)
    except OSError as error:
        if error.errno in files.FULL:
            raise
        raise UserError(
            f"Cannot take a lease on {folder}: {error.strerror}. Give a --workdir that can be written to."
        ) from error
    if number is None:
        yield False
        return
    done = threading.Event()
    heartbeat = threading.Thread(target=_touch, args=(folder, number, stale / 10, done), daemon=True)
    heartbeat.start()
    try:
        yield True
    finally:
        done.set()
        heartbeat.join()
        preemption.lost("")
        for old in _numbers(folder):  # this process's last: until then nobody sees a free folder
            if _is_mine(folder, old) or (old < number and not _living_owner(folder, old, stale)):
                _path(folder, old).unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path, stale: float = STALE) -> Iterator[None]:
    """Holds the lease on a run's folder: a second run in it is refused.

    An owner that cannot be seen from here may be dead, for instance in a container that was started again. So there is
    a wait for its next sign of life, or until its lease has expired.

    Args:
        folder: of the run.
        stale: as in `owner`.

    Raises:
        UserError: another process works in the folder, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        first: tuple[int, float] | None = None
        while not stack.enter_context(hold(folder, stale)):
            with contextlib.suppress(FileNotFoundError):  # released at this moment
                number = _numbers(folder)[-1:] or [0]
                sign = (number[0], _path(folder, number[0]).stat().st_mtime)
                if _is_here(_read(folder, number[0])) or (first and sign != first):
                    raise UserError(in_use(folder, owner(folder, stale)))
                if first is None:
                    print(f"Waits whether {owner(folder, stale)} still works in {folder}.", flush=True)
                first = sign
            time.sleep(min(1.0, stale / 10))
        yield


def in_use(folder: Path, owner: str) -> str:
    """What is said to a second run in a folder."""
    return f"{folder} is in use by {owner}: stop it, wait until it ends, or give another --workdir."


def _take(folder: Path, stale: float) -> int | None:
    """Creates the next lease if the last one has expired; returns None if it has not, or another process was faster."""
    numbers = _numbers(folder)
    if numbers and _living_owner(folder, numbers[-1], stale):
        return None
    number = numbers[-1] + 1 if numbers else 0
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        handle = os.open(_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        owner = {"pid": os.getpid(), "process": _PROCESS, "started": started, "stale": stale}
        json.dump(_machine() | owner, file)
    # Since it was read, the expired lease may have been taken over and released, and the folder leased anew.
    if any(_living_owner(folder, other, stale) for other in _numbers(folder) if other != number):
        _path(folder, number).unlink(missing_ok=True)
        return None
    return number


def _machine() -> dict[str, str]:
    """Identifies where a process id means the same process: containers may share a host name, but not process ids."""
    boot = namespace = ""  # outside Linux
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace}


def _read(folder: Path, number: int) -> dict[str, Any]:
    """The content of a lease; empty if it is not, or not yet, what `_take` writes. Raises OSError if it is gone."""
    try:
        lease = json.loads(_path(folder, number).read_text("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return lease if isinstance(lease, dict) and isinstance(lease.get("pid"), int) else {}


def _is_here(lease: dict[str, Any]) -> bool:
    """Whether a lease is of a process that this one could see."""
    return bool(lease) and all(lease.get(key) == value for key, value in _machine().items())


def _is_mine(folder: Path, number: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(_read(folder, number).get("process") == _PROCESS)
    return False


def _living_owner(folder: Path, number: int, stale: float) -> str:
    """The owner of a lease, or "" if the lease has expired."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as probe:
            now = os.stat(probe.name).st_mtime  # by the clock that stamps the folder's files, maybe a file server's
        silent = now - _path(folder, number).stat().st_mtime
        lease = _read(folder, number)
    except FileNotFoundError:  # released at this moment
        return ""
    given = lease.get("stale")  # its owner, who may touch it more rarely, has another idea of it
    expired = silent > max(stale, given if isinstance(given, int | float) else 0)
    if _is_here(lease):
        mine = lease.get("process") == _PROCESS
        expired |= not mine and (lease["pid"] == os.getpid() or not _is_running(lease["pid"]))
    if expired:
        return ""
    # An empty lease was created at this moment, or by a process that died before writing it.
    return f"{lease.get('host')}, process {lease['pid']}" if lease else "a process that has just begun"


def _is_running(pid: int) -> bool:
    with contextlib.suppress(PermissionError):  # another user's
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


def _touch(folder: Path, number: int, period: float, done: threading.Event) -> None:
    """Touches a lease until `done`; tells the run to end if the highest lease is no longer its own."""
    while not done.wait(period):
        with contextlib.suppress(OSError):  # a file server may be away for a moment
            if _numbers(folder)[-1:] != [number] or not _is_mine(folder, number):
                if _numbers(folder):
                    how = f"{folder} was taken over by another process, as this one gave no sign of life for too long"
                else:
                    how = f"The lease of this process in {folder} is gone, as when that folder was deleted"
                preemption.lost(f"{how}; so this one ends, and saves nothing there. The same command goes on.")
                return
            os.utime(_path(folder, number))


def _path(folder: Path, number: int) -> Path:
    old = folder / f"claim.{number}"  # its name in earlier versions
    return old if old.exists() else folder / f"lease.{number}"


def _numbers(folder: Path) -> list[int]:
    """Numbers of the leases on a folder, ascending."""
    paths = [*folder.glob("lease.*"), *folder.glob("claim.*")]
    return sorted(int(path.suffix[1:]) for path in paths if path.suffix[1:].isdigit())
