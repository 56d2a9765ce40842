"""The hosts (processes) of a run: who joins, who writes, what is decided once for all, and how a run of several ends.

A run alone needs none of this, and every function here is then trivial. Values pass between hosts through the key-value
store of JAX's coordination service, not through the devices: waiting has a timeout, and the missing host a name.

JAX is imported where it is used: `main` asks this module before it has checked the arguments.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from promot_jax.distributed.heartbeat import Lifeline, own_addresses
from promot_jax.errors import HostError, UserError

T = TypeVar("T")

LOST = 76  # exit status of a host that ends because another one is gone: started again, the run goes on
_VISIBLE = 30.0  # seconds until what host 0 writes to shared storage is seen by all
_GRACE = 5.0  # seconds in which hosts that fail alike end by themselves, each with its own message


@dataclass
class _Run:
    """The run of several hosts that this process has joined."""

    lifeline: Lifeline
    index: int
    count: int
    heartbeat_timeout: float
    barrier_timeout: float
    exchanges: int = 0  # so far; hosts make the same ones in the same order
    ending: threading.Event = field(default_factory=threading.Event)


_run: _Run | None = None


def join(
    coordinator: str = "",
    num_hosts: int = 0,
    host_id: int = -1,
    *,
    start_timeout: float = 300,
    heartbeat_timeout: float = 30,
    barrier_timeout: float = 600,
) -> None:
    """Joins the run's other hosts: those given, or those that a TPU VM, GKE, Slurm or Open MPI tells of.

    To be called before JAX touches a device. Without a cluster and without arguments, and with `num_hosts` = 1, this
    process runs alone.

    Args:
        coordinator: "HOST:PORT" of host 0, reachable by all.
        num_hosts: processes of the run; 0 asks the cluster.
        host_id: 0 to `num_hosts` - 1; -1 asks the cluster.
        start_timeout: seconds until all have to be there.
        heartbeat_timeout: seconds of silence after which a host counts as dead and the others end.
        barrier_timeout: seconds that hosts wait for each other at a common point.

    Raises:
        UserError: half of it is given, or hosts are missing, double or not agreed how many they are.
    """
    global _run
    if _run is not None or num_hosts == 1:
        return
    if coordinator or num_hosts or host_id >= 0:
        local_devices = None
    else:
        coordinator, num_hosts, host_id, local_devices = _from_cluster(start_timeout)
        if num_hosts == 1:
            return
    name, _, port = coordinator.rpartition(":")
    if not (name and port.isdecimal() and 0 < int(port) < 1 << 16 and 0 <= host_id < num_hosts):
        raise UserError(
            f"Several hosts need --coordinator=HOST:PORT, --num_hosts and --host_id from 0 to num_hosts - 1, not "
            f"{coordinator!r}, {num_hosts} and {host_id}."
        )
    if min(start_timeout, heartbeat_timeout, barrier_timeout) <= 0:
        raise UserError("--start_timeout, --heartbeat_timeout and --barrier_timeout are seconds, more than 0.")
    name = name.strip("[]")
    lifeline = Lifeline((name, int(port)), num_hosts, host_id, start_timeout)
    import jax

    # Its handler of SIGTERM would take the place of ours (`preemption`).
    jax.config.update("jax_enable_preemption_service", False)
    own = [address[0] for _, address in own_addresses(name, int(port))]
    jax.distributed.initialize(
        coordinator,
        num_hosts,
        host_id,
        local_devices,
        # Where it cannot be known: all addresses, JAX's default.
        coordinator_bind_address=(f"[{own[0]}]:{port}" if ":" in own[0] else f"{own[0]}:{port}") if own else None,
        initialization_timeout=int(start_timeout) + 1,
        heartbeat_timeout_seconds=2 * int(heartbeat_timeout) + 1,  # ours comes first, with names
    )
    _run = _Run(lifeline, host_id, num_hosts, heartbeat_timeout, barrier_timeout)
    lifeline.watch(heartbeat_timeout, _lost)


def _from_cluster(timeout: float) -> tuple[str, int, int, Any]:
    """What the cluster at hand says: address of host 0, hosts, this one, its devices. Without a cluster one host."""
    from promot_jax.distributed.jax_private import ClusterEnv

    if not any(not env.opt_in_only_method and env.is_env_present() for env in ClusterEnv._cluster_types):
        return "", 1, 0, None
    given = os.environ.get("JAX_LOCAL_DEVICE_IDS")  # several devices per process; a cluster would give it one
    devices = [int(device) for device in given.split(",")] if given else None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, devices, None, int(timeout))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"This looks like a cluster, but its hosts cannot be found ({' '.join(str(error).split())}); give "
            "--coordinator, --num_hosts and --host_id, or --num_hosts=1 to run alone."
        ) from error
    address, count, index, local_devices = found
    return address or "", count or 0, -1 if index is None else index, local_devices


def count() -> int:
    """Number of hosts."""
    return _run.count if _run else 1


def index() -> int:
    """Number of this host."""
    return _run.index if _run else 0


def is_writer() -> bool:
    """Whether this host writes reports, and reads what decisions hang on: host 0. Checkpoints are written by all."""
    return index() == 0


def gather(value: T, what: str) -> list[T]:
    """Exchanges a JSON value, and so waits for all hosts; returns the values by host.

    Raises:
        HostError: a host did not come in time; it is named, and the point by `what`.
    """
    if _run is None:
        return [value]
    place = _place(_run, what)
    _post(place, _run.index, value)
    return [_fetch(_run, place, host, what) for host in range(_run.count)]


def barrier(what: str) -> None:
    """Waits for all hosts; `gather` without a value."""
    gather(None, what)


def decide(function: Callable[[], T], what: str) -> T:
    """Calls a function on host 0 alone and hands its result, or its UserError, to all hosts.

    For what reads shared storage and decides how a run goes on: hosts that look at different times may see different
    things, and must not take different ways. The result is JSON.
    """
    if _run is None:
        return function()
    place = _place(_run, what)
    if is_writer():
        try:
            _post(place, 0, {"value": function()})
        except UserError as error:
            _post(place, 0, {"error": str(error)})
    decided = _fetch(_run, place, 0, what)
    if "error" in decided:
        raise UserError(decided["error"])
    value: T = decided["value"]
    return value


def check_shared(folder: Path) -> None:
    """Checks that all hosts see the same folder; host 0 has made it.

    Raises:
        UserError: some do not; they are named.
    """
    if _run is None:
        return
    mark = folder / decide(lambda: f".shared-{os.urandom(4).hex()}", "a mark")
    if is_writer():
        mark.touch()
    deadline = time.monotonic() + _VISIBLE
    while not (seen := mark.is_file()) and time.monotonic() < deadline:
        time.sleep(0.05)
    blind = [_run.lifeline.describe(host) for host, sees in enumerate(gather(seen, "shared storage")) if not sees]
    if is_writer():
        mark.unlink()
    if blind:
        raise UserError(
            f"{folder} of host 0 is not seen by {', '.join(blind)}: --workdir has to lie on storage that all hosts "
            "share."
        )


def whole(array: Any) -> np.ndarray:
    """An array of the mesh on this host, whole; all hosts call this together."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def timely(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields the items; a host that waits for one longer than `barrier_timeout` ends, and the others by its name.

    They would wait in the step's collective, which has no timeout.
    """
    if _run is None:
        yield from items
        return
    iterator = iter(items)
    while True:
        timer = threading.Timer(_run.barrier_timeout, _stuck, (_run, what))
        timer.daemon = True
        timer.start()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            timer.cancel()
        yield item


def posted(key: str) -> str | None:
    """What `post` has left under a key, if anything yet."""
    found = _client().key_value_dir_get(f"promot_jax/{key}/")
    return found[0][1] if found else None


def post(key: str, value: str) -> None:
    """Leaves a value for `posted` on any host."""
    _client().key_value_set(f"promot_jax/{key}/value", value, allow_overwrite=True)


def _client() -> Any:
    """The key-value store."""
    from promot_jax.distributed.jax_private import global_state

    return global_state.client


def _place(run: _Run, what: str) -> str:
    run.exchanges += 1
    return f"promot_jax/{run.exchanges}/{what}"


def _post(place: str, host: int, value: Any) -> None:
    _client().key_value_set(f"{place}/{host}", json.dumps(value))


def _fetch(run: _Run, place: str, host: int, what: str) -> Any:
    from jax.errors import JaxRuntimeError

    try:
        return json.loads(_client().blocking_key_value_get(f"{place}/{host}", int(1000 * run.barrier_timeout)))
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise HostError(
            f"Waited {run.barrier_timeout:g} s at {what!r} for {run.lifeline.describe(host)}, which is alive but does "
            "not come; look at its own output, or give a longer --barrier_timeout."
        ) from None


# ---- the end ---------------------------------------------------------------------------------------------------------


def leave() -> None:
    """Leaves a run that has come to its end on all hosts."""
    global _run
    if _run is not None:
        barrier("the end")
        _run.ending.set()
        _run.lifeline.close()
        import jax

        jax.distributed.shutdown()
        _run = None


def fail(error: BaseException, text: str, status: int) -> None:
    """Ends this process where its run has several hosts, and has the others end too; does nothing otherwise.

    Python's own way out would wait for them in JAX's shutdown, and they for this host in a collective. The text is said
    on stderr here, and its last line in the message of the others.
    """
    if _run is None:
        return
    from jax.errors import JaxRuntimeError

    # JAX raises errors of Gloo as "ValueError: UNKNOWN: Gloo ...".
    if isinstance(error, JaxRuntimeError) or (isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error))):
        # Most likely a collective that lost a host: then the thread that watches them ends this process by name.
        time.sleep(_run.heartbeat_timeout + _GRACE)
    _run.ending.set()
    _run.lifeline.fail(text.strip().splitlines()[-1])
    _end(_run, f"[host {_run.index}] {text}", status)


def is_of_devices(error: BaseException) -> bool:
    """Whether an error is of the devices, their memory or another host, whatever was read or written meanwhile."""
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError | MemoryError) or (isinstance(error, ValueError) and "Gloo" in str(error))


def _lost(host: int, text: str | None) -> None:
    """Ends this process, in the thread that watches the others, because one of them is gone."""
    run = _run
    assert run is not None
    if text is not None and run.ending.wait(_GRACE):
        return  # this host fails alike, and says so itself
    how = text or "its process ended, or the connection broke"
    message = (
        f"Lost {run.lifeline.describe(host)}: {how.rstrip('.')}. So this one ends; the same command resumes the run."
    )
    _end(run, f"[host {run.index}] {message}", 1 if text else LOST)


def _stuck(run: _Run, what: str) -> None:
    """Ends this process, in a timer's thread, because it does not get on."""
    message = f"Waited {run.barrier_timeout:g} s for {what}, which another --barrier_timeout would allow for."
    run.lifeline.fail(message)
    _end(run, f"[host {run.index}] {message}", 1)


def _end(run: _Run, message: str, status: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os.write(2, b"\r\x1b[2K" * os.isatty(2))  # the live line, which nothing else would erase
    run.lifeline.outlive(2 * _GRACE)
    os._exit(status)
