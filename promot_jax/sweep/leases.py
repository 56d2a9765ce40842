"""Who works on a folder: claims through files, for processes on several machines that share a file system.

A claim is the file `claim.<n>` in the folder, made so that only one process can make it; its owner touches it every now
and then. A claim that has not been touched for long belongs to a process that died, and whoever makes `claim.<n + 1>`
takes the folder over: again only one can. An owner that was merely stopped for so long finds that the highest claim is
no more its own when it goes on, and is interrupted at its next sign of life.

This needs a file system that lets one process only create a file, as local disks, NFS and Lustre do; a bucket that is
mounted as a folder may not.
"""

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError

_PROCESS = uuid.uuid4().hex  # a process id alone may be that of a predecessor


def owner(folder: Path, stale: float) -> str:
    """Returns who works on a folder, as "host, process 12", or "" when nobody does.

    Args:
        folder: need not exist.
        stale: seconds without a sign of life after which a claim counts no more. The claim of a process of this machine
            that is gone counts no more at once, unless it was in another container.
    """
    numbers = _numbers(folder)
    return _living(folder, numbers[-1], stale) if numbers else ""


@contextlib.contextmanager
def claim(folder: Path, stale: float) -> Iterator[bool]:
    """Holds a folder for the time of a `with` block, if nobody else does.

    Args:
        folder: made if needed.
        stale: as in `owner`; the claim is touched ten times as often.

    Yields:
        Whether the folder is held. If so, look again whether there is still something to do in it.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _take(folder, stale)
    except OSError as error:
        raise UserError(f"Cannot claim {folder}: {error.strerror}. Give a --workdir that can be written to.") from error
    if number is None:
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, number, stale / 10, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        for old in _numbers(folder):  # the own one last: until then nobody sees a free folder
            if _is_mine(folder, old) or (old < number and not _living(folder, old, stale)):
                _path(folder, old).unlink(missing_ok=True)


def _take(folder: Path, stale: float) -> int | None:
    """Makes the next claim, where the last one is dead; None where it lives, or another process was faster."""
    numbers = _numbers(folder)
    if numbers and _living(folder, numbers[-1], stale):
        return None
    number = numbers[-1] + 1 if numbers else 0
    try:
        handle = os.open(_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({**_machine(), "pid": os.getpid(), "process": _PROCESS, "started": started}, file)
    # The dead claim may have been taken over and given back, and the folder claimed anew, since it was looked at.
    if any(_living(folder, other, stale) for other in _numbers(folder) if other != number):
        _path(folder, number).unlink(missing_ok=True)
        return None
    return number


def _machine() -> dict[str, str]:
    """Where a process id means the same process: containers may share a host's name, but not its process ids."""
    boot = namespace = ""  # where there are no such things, as outside Linux
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace}


def _said(folder: Path, number: int) -> dict[str, Any]:
    """What a claim says of its owner; nothing where it is not, or not yet, written as `_take` does.

    Raises:
        OSError: it cannot be read, or is gone.
    """
    try:
        said = json.loads(_path(folder, number).read_text("utf-8"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) and isinstance(said.get("pid"), int) else {}


def _is_mine(folder: Path, number: int) -> bool:
    """Whether a claim is there and of this process."""
    with contextlib.suppress(FileNotFoundError):
        return bool(_said(folder, number).get("process") == _PROCESS)
    return False


def _living(folder: Path, number: int, stale: float) -> str:
    """The owner of a claim, or "" when it is dead."""
    try:
        age = _now(folder) - _path(folder, number).stat().st_mtime
        said = _said(folder, number)
    except FileNotFoundError:  # given back at this moment
        return ""
    if not said:  # made at this moment, or by a process that died making it
        return "" if age > stale else "a process that has just begun"
    here = all(said.get(key) == value for key, value in _machine().items())
    if here and said.get("process") != _PROCESS and (said["pid"] == os.getpid() or not _runs(said["pid"])):
        return ""
    return "" if age > stale else f"{said.get('host')}, process {said['pid']}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which may be a file server's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as probe:
        return os.stat(probe.name).st_mtime


def _beat(folder: Path, number: int, period: float, done: threading.Event) -> None:
    """Touches a claim until `done`; interrupts the process when the highest claim is no more its own."""
    while not done.wait(period):
        with contextlib.suppress(OSError):  # a file server may be away for a moment
            if _numbers(folder)[-1:] != [number] or not _is_mine(folder, number):
                print(f"{folder} was taken over by another process, as this one gave no sign of life.", flush=True)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            os.utime(_path(folder, number))


def _path(folder: Path, number: int) -> Path:
    return folder / f"claim.{number}"


def _numbers(folder: Path) -> list[int]:
    """Numbers of the claims on a folder, ascending."""
    return sorted(int(path.suffix[1:]) for path in folder.glob("claim.*") if path.suffix[1:].isdigit())
