"""Who takes part in a run of several hosts, and that all of them are alive: one TCP connection from each to host 0.

JAX's own service ends a process when another one is missing, but from within C++ (jax 0.10.2): a missing host or a
doubled id is an abort with a stack trace, a Python callback for missed heartbeats aborts in `std::bad_cast`, and when
host 0 dies 12 of 18 surviving processes ended by abort, also in the recoverable mode. Here a missing, doubled or dead
host is named on every host, in one sentence. Connections are made at
`HOST:PORT` before JAX opens its service there; they stay open, and carry a heartbeat both ways.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from promot_jax.errors import UserError

_RETRY = 0.2  # seconds between attempts to reach host 0
_LONGEST = 1 << 20  # bytes of a message
_HELLO = 5.0  # seconds for the first words of either side
_STRANGERS = 256  # connections that have not said who they are; the oldest go first


class Lifeline:
    """The connection of a host with host 0, and on host 0 those with all others.

    Attributes:
        names: host name by host id.
    """

    def __init__(self, address: tuple[str, int], num_hosts: int, host_id: int, start_timeout: float):
        """Meets the other hosts.

        Args:
            address: of host 0: name and port.
            num_hosts: of the run, at least 2.
            host_id: of this one.
            start_timeout: seconds until all have to be there.

        Raises:
            UserError: hosts are missing, two have the same id, or they do not agree how many they are.
        """
        self._id, self._deadline = host_id, time.monotonic() + start_timeout
        self._start_timeout, self._address = start_timeout, address
        self._writing, self._reading, self._ending = threading.Lock(), threading.Lock(), False
        me = {"token": _token(), "host": host_id, "hosts": num_hosts, "name": socket.gethostname()}
        self._peers: dict[int, socket.socket] = {}
        self.names: list[str] = self._await_hosts(me) if host_id == 0 else self._reach_host_0(me)

    def describe(self, host: int) -> str:
        """A host as messages name it."""
        return f"host {host} ({self.names[host]})"

    # ---- meeting -----------------------------------------------------------------------------------------------------

    def _await_hosts(self, me: dict[str, Any]) -> list[str]:
        """Host 0 waits for the others. Whoever else connects is dropped, and keeps nobody waiting."""
        names, strangers = {0: me["name"]}, dict[socket.socket, tuple[float, bytes]]()  # since when, what they sent
        with contextlib.ExitStack() as opened, selectors.DefaultSelector() as ready:
            servers = [opened.enter_context(server) for server in listen(*self._address)]
            opened.callback(lambda: list(map(socket.socket.close, strangers)))
            for server in servers:
                ready.register(server, selectors.EVENT_READ)
            while len(names) < me["hosts"] or self._drop_closed(names):
                now = time.monotonic()
                if now >= self._deadline:
                    self._refuse_missing(me, names)
                for key, _ in ready.select(min(0.2, self._deadline - now)):
                    peer: Any = key.fileobj
                    if peer in servers:
                        with contextlib.suppress(OSError):  # gone already, or too many files are open
                            peer, _ = peer.accept()
                            peer.setblocking(False)
                            ready.register(peer, selectors.EVENT_READ)
                            strangers[peer] = (now, b"")
                    elif (sent := strangers[peer][1] + (_arrived(peer) or b"")).endswith(b"\n"):
                        del strangers[peer]
                        ready.unregister(peer)
                        self._welcome(peer, _parse(sent), me, names)
                    else:
                        strangers[peer] = (strangers[peer][0] if sent != strangers[peer][1] else 0.0, sent)
                late = [peer for peer, (since, sent) in strangers.items() if now - since > _HELLO or len(sent) > 4096]
                for peer in [*late, *list(strangers)[: max(0, len(strangers) - _STRANGERS)]]:
                    if strangers.pop(peer, None):
                        ready.unregister(peer)
                        peer.close()
        for peer in self._peers.values():  # the listener is closed: JAX opens its own
            with contextlib.suppress(OSError):  # whoever is gone is found out by watching
                _send(peer, {"names": [names[host] for host in sorted(names)]})
        return [names[host] for host in sorted(names)]

    def _welcome(self, peer: socket.socket, hello: dict[str, Any], me: dict[str, Any], names: dict[int, str]) -> None:
        """Counts a host of this run; closes the connection of anybody else."""
        host, name = hello.get("host"), hello.get("name")
        if hello.get("token") != _token() or type(host) is not int or not isinstance(name, str):
            peer.close()
            return
        peer.settimeout(_HELLO)
        before = self._peers.pop(host, None)
        self._peers[host] = peer  # so that it hears of a refusal, too
        self._check(hello, me, names, before)
        names[host] = name
        with contextlib.suppress(OSError):  # gone: found out before the others hear of it
            _send(peer, {"joined": True})

    def _refuse_missing(self, me: dict[str, Any], names: dict[int, str]) -> NoReturn:
        missing = sorted(set(range(me["hosts"])) - set(names))
        self._refuse(
            f"{_counted(missing)} of {me['hosts']} did not join within {self._start_timeout:g} s; start all of "
            f"them with the same command, and let them reach {self._address[0]}:{self._address[1]}."
        )

    def _drop_closed(self, names: dict[int, str]) -> bool:
        """Drops hosts that joined and ended since; whether there were any. They may be started again."""
        gone = [host for host, peer in self._peers.items() if _closed(peer)]
        for host in gone:
            self._peers.pop(host).close()
            del names[host]
        return bool(gone)

    def _check(
        self, hello: dict[str, Any], me: dict[str, Any], names: dict[int, str], before: socket.socket | None
    ) -> None:
        host, name = hello["host"], hello["name"]
        if hello.get("hosts") != me["hosts"]:
            self._refuse(
                f"Host {host} ({name}) was started for {hello.get('hosts')} hosts and host 0 for {me['hosts']}; give "
                "all of them the same --num_hosts."
            )
        if before is not None and _closed(before):
            before.close()  # the host was started again
        elif host in names:
            message = f"Two hosts have the id {host}: {names[host]} and {name}; give each a --host_id of its own."
            self._refuse(message, *([] if before is None else [before]))

    def _refuse(self, message: str, *others: socket.socket) -> NoReturn:
        for peer in (*self._peers.values(), *others):
            with contextlib.suppress(OSError):
                _send(peer, {"refused": message})
            peer.close()
        raise UserError(message)

    def _reach_host_0(self, me: dict[str, Any]) -> list[str]:
        place = f"{self._address[0]}:{self._address[1]}"
        while (left := self._deadline - time.monotonic()) > 0:
            try:
                peer = socket.create_connection(self._address, timeout=left)
            except OSError:
                time.sleep(_RETRY)
                continue
            with contextlib.suppress(OSError):
                _send(peer, me)
            answer = _receive(peer, _HELLO)
            if "joined" in answer:  # host 0 began to wait earlier or later than we did, and knows better who is missing
                answer = _receive(peer, left + self._start_timeout)
            if "names" in answer:
                self._peers[0] = peer
                return list(answer["names"])
            peer.close()
            if "refused" in answer:
                raise UserError(answer["refused"])
            time.sleep(_RETRY)  # the port is open to somebody else, or to a run that goes on without this host
        raise UserError(
            f"Host 0 did not answer host {me['host']} ({me['name']}) at {place} within {self._start_timeout:g} s; "
            "start it, and check --coordinator."
        )

    # ---- living ------------------------------------------------------------------------------------------------------

    def watch(self, timeout: float, report: Callable[[int, str | None], None]) -> None:
        """Watches the others in a thread from now on.

        Args:
            timeout: seconds of silence after which a host counts as dead.
            report: called once, in that thread, with the host that is gone and what it said, or None if it said
                nothing.
        """
        for peer in self._peers.values():
            peer.settimeout(timeout)
        threading.Thread(target=self._watch, args=(timeout, report), name="lifeline", daemon=True).start()

    def _watch(self, timeout: float, report: Callable[[int, str | None], None]) -> None:
        with selectors.DefaultSelector() as ready:
            for host, peer in self._peers.items():
                ready.register(peer, selectors.EVENT_READ, host)
            heard, beat = dict.fromkeys(self._peers, time.monotonic()), 0.0
            waiting, last = dict.fromkeys(self._peers, b""), time.monotonic()
            while self._peers:
                if time.monotonic() - last > timeout / 2:  # this process itself was paused, and heard nobody meanwhile
                    heard = dict.fromkeys(self._peers, time.monotonic())
                last = time.monotonic()
                if time.monotonic() - beat > timeout / 5:
                    self._tell({})
                    beat = time.monotonic()
                for key, _ in ready.select(min(timeout / 5, 1.0)):
                    host = key.data
                    with self._reading:
                        data = _arrived(self._peers[host])
                    if data is None:  # `outlive` was quicker
                        continue
                    heard[host] = time.monotonic()
                    *lines, waiting[host] = (waiting[host] + data).split(b"\n")
                    for message in map(_parse, lines):
                        if "gone" in message and not self._ending:
                            self._lost(message["gone"], message.get("text"), report)
                            return
                    if any("bye" in _parse(line) for line in lines) or (self._ending and not data):
                        ready.unregister(peer := self._peers.pop(host))
                        peer.close()
                    elif not data:
                        self._lost(host, None, report)
                        return
                for host in self._peers:
                    if time.monotonic() - heard[host] > timeout and not self._ending:
                        self._lost(host, f"silent for {timeout:g} s", report)
                        return

    def _lost(self, host: int, text: str | None, report: Callable[[int, str | None], None]) -> None:
        self._tell({"gone": host, "text": text}, besides=host)
        report(host, text)

    def fail(self, text: str) -> None:
        """Tells the others that this host ends, and why."""
        self._ending = True
        self._tell({"gone": self._id, "text": text})

    def outlive(self, seconds: float) -> None:
        """Host 0 waits for the others to end, since JAX ends them without a word once its service is gone."""
        if self._id == 0:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with self._reading:
                    if all(map(_closed, list(self._peers.values()))):
                        return
                time.sleep(0.05)

    def close(self) -> None:
        """Takes leave: from now on this host may go without being missed."""
        self._ending = True
        self._tell({"bye": True})

    def _tell(self, message: dict[str, Any], besides: int | None = None) -> None:
        with self._writing:
            for host, peer in list(self._peers.items()):
                if host != besides:
                    with contextlib.suppress(OSError):  # whoever is gone is found out by reading
                        _send(peer, message)


def listen(name: str, port: int) -> list[socket.socket]:
    """Listens at the addresses that a name means where they are this machine's own, otherwise at all of them.

    A name may mean a loopback address to its own machine alone, as in Debian's /etc/hosts, and another to all others.

    Raises:
        UserError: the port is taken.
    """
    servers: list[socket.socket] = []
    try:
        for family, address in own_addresses(name, port):
            servers.append(socket.create_server(address, family=family, backlog=_STRANGERS))
        if not servers and socket.has_dualstack_ipv6():
            servers = [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
        return servers or [socket.create_server(("", port))]
    except OSError as error:
        for server in servers:
            server.close()
        raise UserError(
            f"Host 0 cannot listen at port {port} ({os.strerror(error.errno or 0)}); choose another --coordinator."
        ) from None


def own_addresses(name: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """The addresses of a name at which this machine can be reached by all; none where that cannot be known."""
    try:
        found = {(family, address) for family, *_, address in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}
    except OSError:
        return []
    known: list[tuple[socket.AddressFamily, tuple[Any, ...]]] = []
    for family, address in sorted(found):
        local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        if local and name not in (address[0], "localhost"):
            return []
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address[0], 0, *address[2:]))
            known.append((family, address))
    return known


def _token() -> str:
    """What the hosts of a run know and others do not: `PROMOT_JAX_TOKEN`, if it is set, makes it a secret."""
    return hashlib.sha256(b"promot_jax 1 " + os.environ.get("PROMOT_JAX_TOKEN", "").encode()).hexdigest()


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket, timeout: float) -> dict[str, Any]:
    """One message; an empty one if there is none in time, or it is none of ours."""
    data, deadline = b"", time.monotonic() + timeout
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < _LONGEST:
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            if not (more := peer.recv(1)):  # what follows the message is not for us
                break
            data += more
    return _parse(data)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _arrived(peer: socket.socket) -> bytes | None:
    """What there is to read, b"" if the other side has closed its connection, None if it has nothing to say."""
    try:
        ready = select.poll()
        ready.register(peer, select.POLLIN)
        return peer.recv(_LONGEST) if ready.poll(0) else None
    except (OSError, ValueError):  # broken, or closed on this side
        return b""


def _closed(peer: socket.socket) -> bool:
    """Whether the other side has closed its connection; what it said before is passed over."""
    while data := _arrived(peer):
        pass
    return data is not None


def _counted(hosts: list[int]) -> str:
    shown = ", ".join(map(str, hosts[:16])) + (", ..." if len(hosts) > 16 else "")
    return f"Host {shown}" if len(hosts) == 1 else f"Hosts {shown}"
