"""Preemption: a notice by SIGTERM or from the cloud stops all hosts of a run at the same step, saved."""

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
from promot_jax.errors import PreemptedError

# https://cloud.google.com/compute/docs/instances/create-use-preemptible: "TRUE" from the notice on, 30 s ahead.
GCE_NOTICE = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"

_noticed = threading.Event()
_rounds = 0  # calls of `stops`, the same on all hosts


@contextlib.contextmanager
def heeded(notice: str = "", period: float = 5.0) -> Iterator[None]:
    """Heeds SIGTERM, and the cloud's notice where there is one, until the block ends.

    Args:
        notice: address that answers "TRUE" once this machine is about to be taken away; "" for none.
        period: seconds between questions.
    """
    global _rounds

    def note(signum: int, frame: FrameType | None) -> None:
        _noticed.set()

    _rounds = 0
    _noticed.clear()
    done = threading.Event()
    # Only the main thread hears signals, and only it may set their handlers.
    hears = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if hears else None
    polling = threading.Thread(target=_poll, args=(notice, period, done), name="preemption notice", daemon=True)
    if notice:
        polling.start()
    try:
        yield
    finally:
        done.set()
        if notice:
            polling.join(2 * period)  # the default handler would end this process
        if hears:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stops() -> bool:
    """Whether the run stops here: at the same call on all hosts, at the latest the one after a notice to any of them.

    All hosts call this equally often, and between two calls wait for each other in a collective: so when a host calls
    for a stop at its next call, no other host can already have made that one.
    """
    global _rounds
    if hosts.count() == 1:
        return _noticed.is_set()
    _rounds += 1
    at = hosts.posted("stop")
    if at is None and _noticed.is_set():
        hosts.post("stop", str(_rounds + 1))
    return at is not None and _rounds >= int(at)


def check(where: str) -> None:
    """Raises PreemptedError if the run stops here (`stops`), where all that is worth keeping is on disk.

    Args:
        where: "during an evaluation".
    """
    if stops():
        raise PreemptedError(f"Preempted {where}.")


def notice_address(wanted: str) -> str:
    """The address that a `--preemption_notice` of "auto", "off" or an address stands for."""
    if wanted == "auto":
        product = Path("/sys/class/dmi/id/product_name")
        with contextlib.suppress(OSError):
            if product.read_text().strip() == "Google Compute Engine":
                return GCE_NOTICE
        return ""
    return "" if wanted == "off" else wanted


def _poll(address: str, period: float, done: threading.Event) -> None:
    # Never through a proxy: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    while not done.wait(period):
        # Not reachable for a while: asked again.
        refused = contextlib.suppress(OSError, ValueError, http.client.HTTPException)
        with refused, opener.open(request, timeout=period) as answer:
            if answer.read(16).strip() == b"TRUE" and not done.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return
