"""A notice, by signal or from the cloud, stops a run at a point that all hosts agree on."""

import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest

from promot_jax.distributed import hosts, preemption
from promot_jax.errors import PreemptedError


def wait() -> bool:
    """Whether the run is told to stop, within a few seconds."""
    deadline = time.monotonic() + 10
    while not preemption.stops() and time.monotonic() < deadline:
        time.sleep(0.01)
    return preemption.stops()


def test_sigterm_is_heeded_inside_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption.heeded():
        assert not preemption.stops()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stops() and preemption.stops()
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.heeded():
        assert not preemption.stops()  # another run


class Cycle:
    """Garbage whose collection is interrupted by Ctrl-C."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def collect() -> None:
    Cycle()
    gc.collect()


def forget() -> None:
    """As a module's lock is forgotten after its import, `importlib._bootstrap._get_module_lock`."""
    lock = threading.Event()
    reference = weakref.ref(lock, lambda _: signal.raise_signal(signal.SIGINT))
    del lock
    assert reference() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("callback", [collect, forget], ids=["garbage collection", "import"])
def test_ctrl_c_is_not_lost_in_a_callback(callback: Callable[[], None], saving: bool) -> None:
    """Python's reference of `object.__del__` and `weakref.ref`: exceptions in such callbacks are ignored."""
    with preemption.interruptible(), preemption.heeded():
        with preemption.saving() if saving else contextlib.nullcontext():
            callback()
            assert preemption.stops() and preemption.interrupted()
        with pytest.raises(PreemptedError, match="Interrupted during"):
            preemption.check("during a test")
        with pytest.raises(KeyboardInterrupt):  # once more: by force
            signal.raise_signal(signal.SIGINT)
    assert not preemption.stops() and not preemption.interrupted()


def test_ctrl_c_ends_at_once_what_does_not_save() -> None:
    with pytest.raises(KeyboardInterrupt), preemption.interruptible():
        signal.raise_signal(signal.SIGINT)


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.interruptible():
            signal.raise_signal(signal.SIGINT)
            assert not preemption.stops()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_suite_in_the_background_takes_ctrl_c_as_others_do() -> None:
    """What `nohup` and `&` leave ignored would be ignored by every process that a test starts."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import conftest; "
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert processes.python(code, PYTHONPATH=str(Path(__file__).parents[1])) == "True\n"


@pytest.fixture(name="cloud")
def _cloud() -> Iterator[SimpleNamespace]:
    """A metadata server; it answers what `answers` holds, the last one for ever."""
    cloud = SimpleNamespace(answers=[b"FALSE"], asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cloud.asked.append((self.path, self.headers["Metadata-Flavor"]))
            answer = cloud.answers.pop(0) if len(cloud.answers) > 1 else cloud.answers[0]
            self.send_response(200 if answer else 503)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        cloud.address = f"http://127.0.0.1:{server.server_port}/computeMetadata/v1/instance/preempted"
        yield cloud
        server.shutdown()
        thread.join()


def test_the_notice_of_the_cloud(cloud: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked
    cloud.answers = [b"FALSE", b"", b"FALSE\n", b"TRUE\n"]
    with preemption.heeded(cloud.address, period=0.02):
        assert wait()
    assert len(cloud.asked) >= 4  # an answer may come too late
    assert set(cloud.asked) == {("/computeMetadata/v1/instance/preempted", "Google")}


def test_no_notice_no_stop(cloud: SimpleNamespace) -> None:
    with preemption.heeded(cloud.address, period=0.01):
        while len(cloud.asked) < 5:
            time.sleep(0.01)
        assert not preemption.stops()


def test_where_the_notice_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preemption.notice_address("off") == ""
    assert preemption.notice_address("http://here/x") == "http://here/x"
    for product, address in (("Google Compute Engine\n", preemption.GCE_NOTICE), ("Something else", "")):
        monkeypatch.setattr(preemption.Path, "read_text", lambda self, product=product: product)
        assert preemption.notice_address("auto") == address


@pytest.mark.parametrize("noticed", [(0,), (1,), (0, 1)])
def test_hosts_stop_at_the_same_call(noticed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts in step, each with its own count and notice; they meet between two calls, in any order."""
    store: dict[str, str] = {}
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "posted", store.get)
    monkeypatch.setattr(hosts, "post", store.__setitem__)
    rounds, notices = [0, 0], [False, False]

    def call(host: int) -> bool:
        monkeypatch.setattr(preemption, "_rounds", rounds[host])
        monkeypatch.setattr(preemption, "_noticed", notices[host])
        stops = preemption.stops()
        rounds[host] = preemption._rounds
        return stops

    for step in range(6):
        if step == 3:
            for host in noticed:
                notices[host] = True
        order = (0, 1) if step % 2 else (1, 0)
        told = {host: call(host) for host in order}
        assert told == {0: step >= 4, 1: step >= 4}
