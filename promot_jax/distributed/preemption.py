"""What stops a run, saved: SIGTERM, Ctrl-C, the cloud's notice, a lost lease; all hosts stop at the same step.

Each sets a flag, at which the run looks where it can stop. An exception raised by a signal's handler would be lost in a
callback of the garbage collector or of an import, which Python lets nothing out of.
"""

import contextlib
import http.client
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from promot_jax.distributed import hosts
from promot_jax.errors import PreemptedError, TakenOverError

# https://cloud.google.com/compute/docs/instances/create-use-preemptible: "TRUE" from the notice on, 30 s ahead.
GCE_NOTICE = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"

_AGAIN = b"Interrupted: stops at the next step, saved. Ctrl-C again stops at once, unsaved.\n"

_noticed = False  # no `Event`: a signal that lands in its `set` would wait for itself
_interrupted = False  # by Ctrl-C
_saves = False  # within `saving`
_lost = ""  # how the lease on the run's folder was lost
_rounds = 0  # calls of `stops`, the same on all hosts
_as_it_is = contextlib.nullcontext()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Heeds Ctrl-C (SIGINT) until the block ends: it raises KeyboardInterrupt, but for the first one within `saving`.

    A process that was started with SIGINT ignored, as by `nohup` or `&`, goes on ignoring it.
    """
    global _interrupted, _noticed
    try:
        with _handled(signal.SIGINT) if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else _as_it_is:
            yield
    finally:
        _interrupted = False
        _noticed = False


@contextlib.contextmanager
def heeded(notice: str = "", period: float = 5.0) -> Iterator[None]:
    """Heeds SIGTERM, and the cloud's notice where there is one, until the block ends.

    Args:
        notice: address that answers "TRUE" once this machine is about to be taken away; "" for none.
        period: seconds between questions.
    """
    global _noticed, _rounds
    _rounds, done = 0, threading.Event()
    polling = threading.Thread(target=_poll, args=(notice, period, done), name="preemption notice", daemon=True)
    if notice:
        polling.start()
    try:
        with _handled(signal.SIGTERM):
            yield
    finally:
        done.set()
        if notice:
            polling.join(2 * period)  # a late notice would stop another run
        if not _interrupted:
            _noticed = False


@contextlib.contextmanager
def _handled(number: signal.Signals) -> Iterator[None]:
    """Handles a signal here, in the main thread: no other hears signals, or may set their handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, _note)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    global _interrupted, _noticed
    again = _noticed
    _noticed = True
    if number == signal.SIGINT:
        _interrupted = True
        if again or not _saves:
            raise KeyboardInterrupt
        # `print` may be in the middle of another line; on a terminal the message takes the place of the live line.
        os.write(2, b"\r\x1b[2K" * os.isatty(2) + _AGAIN)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within this block the first Ctrl-C only sets the flag: whoever opens it asks `stops` often, and saves."""
    global _saves
    _saves = True
    try:
        yield
    finally:
        _saves = False


def lost(how: str) -> None:
    """Notes, from any thread, how the lease on the run's folder was lost; "" once this process let go of it."""
    global _lost
    _lost = how


def word() -> str:
    """How the run was told to stop, in messages."""
    return "interrupted" if _interrupted else "preempted"


def interrupted() -> bool:
    """Whether Ctrl-C told this run to stop."""
    return _interrupted


def stops() -> bool:
    """Whether the run stops here: at the same call on all hosts, at the latest the one after a notice to any of them.

    All hosts call this equally often, and between two calls wait for each other in a collective: so when a host calls
    for a stop at its next call, no other host can already have made that one.

    Raises:
        TakenOverError: the run's folder is another process's or was deleted; nothing may be saved there.
    """
    global _rounds
    if _lost:
        raise TakenOverError(_lost)
    if hosts.count() == 1:
        return _noticed
    _rounds += 1
    at = hosts.posted("stop")
    if at is None and _noticed:
        hosts.post("stop", str(_rounds + 1))
    return at is not None and _rounds >= int(at)


def check(where: str) -> None:
    """Raises PreemptedError if the run stops here (`stops`), where all that is worth keeping is on disk.

    Args:
        where: "during an evaluation".
    """
    if stops():
        raise PreemptedError(f"{word().capitalize()} {where}.")


def notice_address(flag: str) -> str:
    """The address that a `--preemption_notice` of "auto", "off" or an address stands for."""
    if flag == "auto":
        product = Path("/sys/class/dmi/id/product_name")
        with contextlib.suppress(OSError):
            if product.read_text().strip() == "Google Compute Engine":
                return GCE_NOTICE
        return ""
    return "" if flag == "off" else flag


def _poll(address: str, period: float, done: threading.Event) -> None:
    global _noticed
    # Never through a proxy: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    while not done.wait(period):
        # Not reachable for a while: asked again.
        refused = contextlib.suppress(OSError, ValueError, http.client.HTTPException)
        with refused, opener.open(request, timeout=period) as answer:
            if answer.read(16).strip() == b"TRUE" and not done.is_set():
                _noticed = True
                return
