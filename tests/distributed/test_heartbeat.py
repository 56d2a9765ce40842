"""Hosts that meet, miss each other and lose each other; each host is a thread here."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from promot_jax.distributed import heartbeat
from promot_jax.distributed.heartbeat import Lifeline
from promot_jax.errors import UserError

NAME = socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


hosts_of_this_test: list[Future[Lifeline]] = []


def start(*hosts: tuple[int, int], timeout: float = 20.0, port: int = 0) -> list[Future[Lifeline]]:
    """Starts hosts, each given by its id and the number of hosts it expects, host 0 first."""
    port = port or free_port()
    pool = ThreadPoolExecutor(len(hosts))
    started = [pool.submit(Lifeline, ("127.0.0.1", port), count, host, timeout) for host, count in hosts]
    pool.shutdown(wait=False)
    hosts_of_this_test.extend(started)
    return started


class Reports:
    """What each host is told of the others."""

    def __init__(self) -> None:
        self.said: dict[int, tuple[int, str | None]] = {}

    def of(self, host: int) -> Callable[[int, str | None], None]:
        return lambda gone, text: self.said.update({host: (gone, text)})

    def wait(self, count: int, seconds: float = 10.0) -> dict[int, tuple[int, str | None]]:
        deadline = time.monotonic() + seconds
        while len(self.said) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.said


@pytest.fixture(autouse=True)
def _closed_in_the_end() -> Iterator[None]:
    yield
    met = [future.result() for future in hosts_of_this_test if future.exception(60) is None]
    hosts_of_this_test.clear()
    for lifeline in met:
        lifeline._ending = True
        cut(lifeline)
    for thread in threading.enumerate():
        if thread.name == "lifeline":
            thread.join(10)
    for lifeline in met:
        for peer in lifeline._peers.values():
            peer.close()


def living(count: int, timeout: float = 10.0) -> tuple[list[Lifeline], Reports]:
    reports = Reports()
    lifelines = [future.result() for future in start(*((host, count) for host in range(count)))]
    for host, lifeline in enumerate(lifelines):
        lifeline.watch(timeout, reports.of(host))
    return lifelines, reports


def cut(lifeline: Lifeline) -> None:
    """What the system does when a process dies."""
    for peer in list(lifeline._peers.values()):
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)


def test_all_meet() -> None:
    lifelines, reports = living(3)
    assert [lifeline.names for lifeline in lifelines] == [[NAME] * 3] * 3
    assert lifelines[1].describe(2) == f"host 2 ({NAME})"
    for lifeline in lifelines:
        lifeline.close()
    time.sleep(0.2)
    for lifeline in lifelines:
        cut(lifeline)  # who has taken leave is not missed
    time.sleep(0.2)
    assert reports.said == {}


def test_missing_hosts_are_named_on_all_hosts() -> None:
    for future in start((0, 4), (2, 4), timeout=3.0):
        with pytest.raises(UserError, match=r"^Hosts 1, 3 of 4 did not join within 3 s; start all of them"):
            future.result()


def test_without_host_0() -> None:
    with pytest.raises(UserError, match=rf"^Host 0 did not answer host 1 \({NAME}\) at 127.0.0.1:\d+ within 0.5 s"):
        start((1, 2), timeout=0.5)[0].result()


def test_two_hosts_of_one_id() -> None:
    for future in start((0, 3), (1, 3), (1, 3)):
        with pytest.raises(UserError, match=rf"Two hosts have the id 1: {NAME} and {NAME}; give each a --host_id of"):
            future.result(20)


def test_other_numbers_of_hosts() -> None:
    first, *_ = start((0, 3), (1, 2), timeout=2.0)
    with pytest.raises(UserError, match=rf"Host 1 \({NAME}\) was started for 2 hosts and host 0 for 3"):
        first.result()


def connect(port: int, message: bytes) -> socket.socket:
    """Something that says one thing to host 0, as soon as that listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            peer = socket.create_connection(("127.0.0.1", port), timeout=20)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "host 0 does not listen"
            time.sleep(0.01)
    peer.sendall(message)
    return peer


def hello(host: int, name: str) -> bytes:
    return json.dumps({"token": heartbeat._token(), "host": host, "hosts": 3, "name": name}).encode() + b"\n"


def test_a_host_that_was_started_again_and_strangers() -> None:
    port = free_port()
    first = start((0, 3), port=port)[0]
    with connect(port, b""):
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x00\n", hello(1, "dead"), hello(1, "dead again")):
            connect(port, message).close()
    with connect(port, hello(2, "alive")):  # the last one of three, but host 1 is closed by now
        again = start((1, 3), port=port)[0]
        assert first.result(30).names == again.result(30).names == [NAME, NAME, "alive"]


@pytest.mark.parametrize(
    "message",
    [
        b'{"host": 1, "hosts": 3, "name": "without the token"}\n',
        b'{"token": "guessed", "host": 1, "hosts": 3, "name": "x"}\n',
        b"[" * 3000 + b"\n",  # Python's json module raises RecursionError
        b'{"host": ' + b"9" * 4000 + b"}\n",
        b"\xff\xfe\x00\n",
        b"x" * 100_000,
        hello(True, "no number"),
    ],
    ids=["no token", "another token", "nested", "a long number", "no text", "endless", "a boolean"],
)
def test_strangers_are_not_counted_and_crash_nothing(message: bytes) -> None:
    """The hosts of the run are those that it was started with: `NAME` twice and `alive`."""
    port = free_port()
    first = start((0, 3), port=port)[0]
    with connect(port, b""), contextlib.suppress(ConnectionError), connect(port, message):
        pass
    with connect(port, hello(2, "alive")):
        again = start((1, 3), port=port)[0]
        assert first.result(15).names == again.result(15).names == [NAME, NAME, "alive"]


def test_strangers_delay_neither_the_hosts_nor_the_timeout() -> None:
    """500 connections that say nothing, and one that says a byte now and then."""
    port = free_port()
    began = time.monotonic()
    first = start((0, 3), port=port, timeout=4.0)[0]
    with contextlib.ExitStack() as opened:
        slow = opened.enter_context(connect(port, b"{"))
        for _ in range(500):
            opened.enter_context(connect(port, b""))
        while not first.done():
            with contextlib.suppress(OSError):
                slow.send(b" ")
            time.sleep(0.1)
    assert time.monotonic() - began < 8
    with pytest.raises(UserError, match=r"^Hosts 1, 2 of 3 did not join within 4 s"):
        first.result()

    first = start((0, 2), port=port)[0]
    with contextlib.ExitStack() as opened:
        for _ in range(500):
            opened.enter_context(connect(port, b""))
        began = time.monotonic()
        assert start((1, 2), port=port)[0].result(15).names == first.result(15).names == [NAME, NAME]
        assert time.monotonic() - began < 5  # `_HELLO`, for which the silent ones may stay


def test_a_host_does_not_wait_for_a_stranger_at_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_HELLO", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # says nothing
        began = time.monotonic()
        with pytest.raises(UserError, match="Host 0 did not answer host 1"):
            start((1, 2), port=server.getsockname()[1], timeout=1.0)[0].result(20)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "resolved", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.1"]),
        ("localhost", ["127.0.0.1"], ["127.0.0.1"]),
        ("host-0", ["127.0.1.1"], []),  # of Debian's /etc/hosts: others mean another address by this name
        ("host-0", ["192.0.2.1"], []),  # RFC 5737: nobody's; as behind a service's or a translated address
        ("host-0", OSError(), []),
    ],
)
def test_host_0_listens_where_it_is_reached(
    name: str, resolved: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(asked: str, port: int, **options: Any) -> list[Any]:
        assert asked == name
        if isinstance(resolved, OSError):
            raise resolved
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in resolved]

    port = free_port()
    with monkeypatch.context() as patch:
        patch.setattr(heartbeat.socket, "getaddrinfo", getaddrinfo)
        servers = heartbeat.listen(name, port)
    found = [str(server.getsockname()[0]) for server in servers]
    for server in servers:
        server.close()
    assert found == expected or (not expected and found[0] in ("::", "0.0.0.0"))


def test_a_port_in_use() -> None:
    taken = r"cannot listen at port \d+ \(Address already in use\)"
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match=taken):
        start((0, 2), port=server.getsockname()[1])[0].result()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_is_told_to_all(victim: int) -> None:
    lifelines, reports = living(3)
    lifelines[victim]._ending = True  # the dead say nothing
    cut(lifelines[victim])
    others = {0, 1, 2} - {victim}
    assert reports.wait(2) == dict.fromkeys(others, (victim, None))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_failure_is_told_with_its_reason(victim: int) -> None:
    lifelines, reports = living(3)
    lifelines[victim].fail("no such file")
    assert reports.wait(2) == dict.fromkeys({0, 1, 2} - {victim}, (victim, "no such file"))


def test_silence_counts_as_death(monkeypatch: pytest.MonkeyPatch) -> None:
    lifelines, reports = living(3, timeout=3.0)
    time.sleep(4)
    assert reports.said == {}  # heartbeats
    monkeypatch.setattr(lifelines[1], "_tell", lambda *args, **options: None)
    assert reports.wait(2)[0] == (1, "silent for 3 s")


def test_host_0_outlives_the_others() -> None:
    lifelines, _ = living(2)
    lifelines[0].fail("over")
    waiting = threading.Thread(target=lifelines[0].outlive, args=(20.0,))
    begin = time.monotonic()
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    cut(lifelines[1])
    waiting.join()
    assert time.monotonic() - begin < 10


def test_outliving_and_watching_do_not_take_each_others_messages_for_an_end() -> None:
    lifelines, _ = living(2)
    lifelines[0]._ending = True
    waiting = [threading.Thread(target=lifelines[0].outlive, args=(20.0,)) for _ in range(8)]
    for thread in waiting:
        thread.start()
    for _ in range(500):
        lifelines[1]._tell({})
        time.sleep(0.001)
    assert all(thread.is_alive() for thread in waiting)
    cut(lifelines[1])
    for thread in waiting:
        thread.join()


def test_each_host_says_itself_why_it_ends() -> None:
    """Hosts that fail alike do not take each other's end for the reason."""
    lifelines, reports = living(2)
    outcome: list[Any] = [lifeline.fail("the same mistake") for lifeline in lifelines]
    assert outcome == [None, None]
    time.sleep(0.3)
    assert len(reports.said) <= 1  # the first message may have been quicker than the second failure
