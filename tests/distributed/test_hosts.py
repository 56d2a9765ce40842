"""Runs of several hosts, each a process of its own with CPU devices: what they compute, write, survive and say."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import compilation
import hosts_worker
import jax
import numpy as np
import processes
import pytest
import tiny
from jax._src.clusters import cloud_tpu_cluster
from resumed import check_same

from promot_jax import main
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.distributed import hosts
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.params.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(devices: int) -> dict[str, str]:
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    settings["XLA_FLAGS"] = compilation.flags(f"--xla_force_host_platform_device_count={devices}")
    return {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | settings


# ---- without a model -------------------------------------------------------------------------------------------------


def work(folder: Path, count: int, devices: int, mesh: dict[str, int]) -> list[dict[str, Any]]:
    """Runs `hosts_worker` on some hosts; returns what each says."""
    arguments = [json.dumps(mesh), str(folder / "source"), str(folder / "target")]
    port = free_port()
    started = [
        processes.start(
            [sys.executable, str(ROOT / "tests/hosts_worker.py"), str(port), str(count), str(index), *arguments],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]
    said, ended = [], threading.Event()
    # A stranger at the port, while hosts join and later, where JAX listens, disturbs nobody.
    times: list[float] = []
    stranger = threading.Thread(target=knock, args=(port, ended, times))
    stranger.start()
    try:
        for process in started:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        ended.set()
        stranger.join()
    assert count == 1 or times  # it was heard
    return said


def knock(port: int, ended: threading.Event, times: list[float]) -> None:
    """Connects to a port again and again and says what is no greeting there, until `ended`; notes when it could."""
    for words in itertools.cycle((b"GET / HTTP/1.1\r\n\r\n", b"", b"\x80\x00\n" * 1000)):
        if ended.wait(0.2):
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as peer:
            peer.sendall(words)
            times.append(time.monotonic())


def check_work(folder: Path, count: int, devices: int, mesh: dict[str, int]) -> None:
    """Writes a checkpoint on one device, has hosts take it over to their mesh, and reads what they write."""
    source = Checkpoints(folder / "source")
    saved = hosts_worker.make_state(Partitioner(), seed=2)
    source.save(4, saved, hosts_worker.PROGRESS, 10.0)
    source.close()

    said = work(folder, count, devices, mesh)
    rows = [row for host in said for row in host["held"]]
    replicas = len(rows) // 16
    assert sorted(rows) == sorted([*range(16)] * replicas)
    name = socket.gethostname()
    for index, host in enumerate(said):
        assert (host["host"], host["count"], host["devices"]) == (index, count, count * devices)
        assert host["tokens"] == np.arange(48).reshape(16, 3).tolist()
        params = hosts_worker.parameters()
        assert host["fingerprint"] == host["pieces"] == fingerprint(params)
        # Of a kernel whose rows are split over hosts, each reads its own.
        part = max(1, mesh["fsdp"] * mesh["model"] // devices) if mesh["fsdp"] > 1 else 1
        first = index % part * 8 // part
        assert host["leaf"] == [2, 8, 16]
        assert host["read"] == [[layer, row] for layer in (0, 1) for row in range(first, first + 8 // part)]
        assert host["gathered"] == [[other] for other in range(count)]
        assert host["decided"] == 0 and host["refused"] == "UserError: host 0 refuses"
        others = ", ".join(f"host {other} ({name})" for other in range(1, count))
        apart = f"{folder}/target/host_{index} of host 0 is not seen by {others}: --workdir has to lie on storage that"
        assert host["shared"] == ["nothing", f"UserError: {apart} all hosts share." if count > 1 else "nothing"]
        assert host["latest"] == 4 and host["progress"] == hosts_worker.PROGRESS
        assert host["restored"] == fingerprint(saved["params"])
        assert len(host["split"]) > 2 and host["nothing there"]
    if count > 1:
        assert said[-1]["late"] == ""
        assert said[0]["late"] == (
            f"HostError: Waited 1 s at 'a late point' for host {count - 1} ({name}), which is alive but does not "
            "come; look at its own output, or give a longer --barrier_timeout."
        )
    assert json.loads((folder / "target/written.json").read_text()) == {"host": 0}
    prompt = np.load(folder / "target/prompt/prompt.npy")
    assert np.array_equal(prompt, hosts_worker.parameters()["prompt"]["task"])

    target = Checkpoints(folder / "target/checkpoints")
    restored, progress = target.restore(5, hosts_worker.make_state(Partitioner(), seed=3))
    assert progress == hosts_worker.PROGRESS
    assert fingerprint(restored["params"]) == fingerprint(saved["params"])
    target.close()


def test_two_hosts(tmp_path: Path) -> None:
    check_work(tmp_path, 2, 4, {"data": 1, "fsdp": 2, "model": 4})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (1, 8, {"data": 2, "fsdp": 2, "model": 2}),
        (4, 2, {"data": 2, "fsdp": 2, "model": 2}),
        (2, 4, {"data": 1, "fsdp": 1, "model": 8}),
        (4, 2, {"data": 1, "fsdp": 8, "model": 1}),
    ],
    ids=str,
)
def test_other_meshes(tmp_path: Path, count: int, devices: int, mesh: dict[str, int]) -> None:
    check_work(tmp_path, count, devices, mesh)


def test_alone_everything_is_trivial() -> None:
    hosts.join()
    hosts.join("10.0.0.1:1", num_hosts=1, host_id=0)
    assert (hosts.count(), hosts.index(), hosts.is_writer()) == (1, 0, True)
    assert hosts.gather({"a": 1}, "a value") == [{"a": 1}]
    assert hosts.decide(lambda: 3, "a number") == 3
    hosts.barrier("nothing")
    hosts.fail(ValueError("x"), "x", 1)
    hosts.leave()


def test_a_host_that_waits_too_long_for_a_batch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(hosts.timely(range(3), "the next batch")) == [0, 1, 2]
    ended, said = threading.Event(), []
    lifeline = SimpleNamespace(fail=said.append)
    monkeypatch.setattr(hosts, "_run", SimpleNamespace(barrier_timeout=0.2, lifeline=lifeline, index=1))
    monkeypatch.setattr(hosts, "_end", lambda run, message, status: (said.append((message, status)), ended.set()))

    def slow() -> Iterator[int]:
        yield 0
        assert ended.wait(30)
        yield 1

    assert list(hosts.timely(slow(), "the next batch")) == [0, 1]
    message = "Waited 0.2 s for the next batch, which another --barrier_timeout would allow for."
    assert said == [message, (f"[host 1] {message}", 1)]


@pytest.mark.parametrize(
    "given",
    [
        {"coordinator": "somewhere:1234"},
        {"num_hosts": 2},
        {"coordinator": "somewhere", "num_hosts": 2, "host_id": 0},
        {"coordinator": "somewhere:123456", "num_hosts": 2, "host_id": 0},
        {"coordinator": "somewhere:1234", "num_hosts": 2, "host_id": 2},
    ],
)
def test_half_given_hosts_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Several hosts need --coordinator=HOST:PORT, --num_hosts and --host_id from 0"):
        hosts.join(**given)
    with pytest.raises(UserError, match="are seconds, more than 0"):
        hosts.join("somewhere:1234", 2, 0, barrier_timeout=0)


def test_hosts_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and Open MPI say who takes part; what they say reaches `Lifeline`."""
    seen = []

    def lifeline(address: tuple[str, int], count: int, index: int, timeout: float) -> None:
        seen.append((address[0], count, index))
        raise UserError("enough")

    monkeypatch.setattr(hosts, "Lifeline", lifeline)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[003-006]", "SLURM_NTASKS": "4"}
    slurm |= {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    ompi = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3"}
    ompi |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    for cluster in (slurm, ompi):
        with monkeypatch.context() as patch:
            for name, value in cluster.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match="enough"):
                hosts.join()
            hosts.join(num_hosts=1)  # alone all the same
    assert seen == [("node003", 4, 2), ("10.96.0.1", 3, 1)]
    for ids, devices in ((None, [0]), ("0,1,2,3", [0, 1, 2, 3])):  # one per process unless it is said
        with monkeypatch.context() as patch:
            for name, value in (slurm | ({"JAX_LOCAL_DEVICE_IDS": ids} if ids else {})).items():
                patch.setenv(name, value)
            assert hosts._from_cluster(1.0)[1:] == (4, 2, devices)
    with monkeypatch.context() as patch:
        for name, value in (slurm | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
            patch.setenv(name, value)
        hosts.join()  # a cluster of one host
        patch.setenv("SLURM_NTASKS", "many")
        with pytest.raises(UserError, match=r"looks like a cluster, but its hosts cannot be found \(invalid literal"):
            hosts.join()
    assert hosts.count() == 1


@pytest.mark.parametrize(
    ("address", "own", "bound"),
    [
        ("host-0:4321", [("inet", ("192.0.2.1", 4321))], "192.0.2.1:4321"),
        ("[2001:db8::1]:4321", [("inet6", ("2001:db8::1", 4321, 0, 0))], "[2001:db8::1]:4321"),
        ("host-0:4321", [], None),
    ],
)
def test_jax_listens_where_host_0_is_reached(
    monkeypatch: pytest.MonkeyPatch, address: str, own: list[Any], bound: str | None
) -> None:
    """Its own choice is all interfaces; where the address is not this machine's own, nothing else can be said."""
    joined: list[dict[str, Any]] = []
    met = SimpleNamespace(watch=lambda *_: None, names=["a", "b"])
    monkeypatch.setattr(hosts, "Lifeline", lambda *_: met)
    monkeypatch.setattr(hosts, "_run", None)
    monkeypatch.setattr(hosts, "own_addresses", lambda *_: own)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: joined.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.join(address, 2, 0)
    assert [options["coordinator_bind_address"] for options in joined] == [bound]


def test_hosts_of_a_tpu_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """GKE tells them in the environment, a TPU VM through its metadata server."""
    seen = []

    def lifeline(address: tuple[str, int], count: int, index: int, timeout: float) -> None:
        seen.append((*address, count, index))
        raise UserError("enough")

    monkeypatch.setattr(hosts, "Lifeline", lifeline)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": "x:y:127.0.0.1,x:y:127.0.0.2", "tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    with monkeypatch.context() as patch:
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other,third")
        patch.setenv("TPU_WORKER_ID", "2")
        with pytest.raises(UserError, match="enough"):
            hosts.join()
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(UserError, match="enough"):
        hosts.join()
    assert seen == [("localhost", 8482, 3, 2), ("127.0.0.1", 8482, 2, 1)]


# ---- whole runs ------------------------------------------------------------------------------------------------------

# Every axis of the mesh, data in shards, packed batches, dropout, accumulated gradients; both stages.
GIN = """\
TRAIN_STEPS = 9
PROMPT_TRAIN_STEPS = 5
BATCH_SIZE = 16
DATA_SHARDS = 4
compare.methods = ("promot",)
prompt/Training.dropout_rate = 0.1
model/Training.dropout_rate = 0.1
prompt/Training.pack = True
model/Training.microbatches = 2
Evaluation.shots = (1,)
Evaluation.tokens_per_batch = 1024
"""
MESHES = {8: "Partitioner.fsdp = 2\nPartitioner.model = 2\n", 1: ""}


class Mesh(NamedTuple):
    """So many hosts of so many devices."""

    count: int
    devices: int

    def __str__(self) -> str:
        return f"{self.count}x{self.devices}"


class Run:
    """A run of `promot_jax.main` on several hosts, and what each of them says."""

    def __init__(self, folder: Path, workdir: Path, mesh: Mesh, arguments: list[str] | None = None):
        if arguments is None:
            gin_file = folder / f"hosts_{mesh}.gin"
            gin_file.write_text(GIN + MESHES[mesh.count * mesh.devices])
            arguments = [*tiny.command(folder, "demo.gin", workdir), f"--gin_file={gin_file}"]
        command = [sys.executable, "-m", "promot_jax.main", *arguments]
        command += ["--heartbeat_timeout=20", "--start_timeout=120"]
        port = free_port()
        self.said = [""] * mesh.count
        self.errors = [workdir.parent / f"{workdir.name}.{index}.errors" for index in range(mesh.count)]
        self.hosts = []
        for index in range(mesh.count):
            joining = [f"--coordinator=127.0.0.1:{port}", f"--num_hosts={mesh.count}", f"--host_id={index}"]
            with self.errors[index].open("w") as errors:
                process = processes.start(
                    [*command, *(joining if mesh.count > 1 else [])], env=environment(mesh.devices),
                    stdout=subprocess.PIPE, stderr=errors, cwd=workdir.parent,
                )  # fmt: skip
            self.hosts.append(process)
        self._readers = [threading.Thread(target=self._read, args=(index,)) for index in range(mesh.count)]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int) -> None:
        stream = self.hosts[index].stdout
        assert stream is not None
        with stream:
            for line in stream:
                self.said[index] += line

    def wait_for(self, pattern: str, seconds: float = 1200) -> None:
        """Waits until host 0 has said something."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said[0]):
            assert time.monotonic() < deadline and self.hosts[0].poll() is None, self.complaints()
            time.sleep(0.02)

    def end(self, seconds: float = 1200) -> list[int]:
        """Waits for all hosts; returns their exit statuses."""
        try:
            return [process.wait(seconds) for process in self.hosts]
        finally:
            for process in self.hosts:
                process.kill()
            for reader in self._readers:
                reader.join()

    def complaints(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.errors)


def finish(folder: Path, workdir: Path, mesh: Mesh) -> Run:
    """Runs to the end."""
    run = Run(folder, workdir, mesh)
    assert run.end() == [0] * mesh.count, run.complaints()
    return run


def interrupt(run: Run, pattern: str, victim: int, what: signal.Signals) -> float:
    """Sends a signal to one host once host 0 has said something; returns the time."""
    run.wait_for(pattern)
    run.hosts[victim].send_signal(what)
    return time.monotonic()


def check_close(workdir: Path, reference: Path) -> None:
    """Checks that two runs on different meshes left the same: losses and weights within 1e-5, the same outputs."""
    for stage in ("stage1", "stage2"):
        found, wanted = (json.loads((path / CELL / stage / "stage.json").read_text()) for path in (workdir, reference))
        assert found["best_step"] == wanted["best_step"] and found["skipped"] == wanted["skipped"]
        losses = [[point["loss"] for point in one["curve"][1:]] for one in (found, wanted)]
        assert np.allclose(*losses, rtol=1e-5, atol=0)
        assert [point["target"] for point in found["curve"]] == [point["target"] for point in wanted["curve"]]
    prompts = [np.load(path / CELL / "stage1/prompt/prompt.npy") for path in (workdir, reference)]
    assert np.allclose(*prompts, rtol=1e-5, atol=1e-6)
    rows = sorted((reference / CELL).rglob("*.jsonl"))
    assert {path.name for path in rows} >= {"target.jsonl", "icl_1shot.jsonl", "step_000009.jsonl"}
    for path in rows:
        assert (workdir / path.relative_to(reference)).read_text() == path.read_text(), path
    first, second = (json.loads((path / CELL / "results.json").read_text()) for path in (workdir, reference))
    assert (first["target"], first["icl"]) == (second["target"], second["icl"])


CELL = "promot/seed_0"
TWO = Mesh(2, 4)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.workspace(tmp_path_factory.mktemp("hosts"))


@pytest.mark.slow
def test_two_hosts_answer_as_one(folder: Path, tmp_path: Path) -> None:
    """Of three inputs, with a batch of eight rows: padding on both hosts."""
    asked = ["--gin.infer.inputs=('Review: it was', 'Thing: snow', 'Animal: elk, and more of it')"]
    run = Run(folder, tmp_path / "two", Mesh(2, 2), [*tiny.command(folder, "infer.gin", tmp_path / "two"), *asked])
    assert main.main([*tiny.command(folder, "infer.gin", tmp_path / "one"), *asked]) == 0
    assert run.end() == [0, 0], run.complaints()
    assert (tmp_path / "two/outputs.jsonl").read_text() == (tmp_path / "one/outputs.jsonl").read_text()
    assert "Devices: 4 cpu, hosts: 2." in run.said[0] and "Gloo" not in run.said[0]
    assert run.said[1] == ""  # host 0 speaks for all
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "config.gin",
        "operative_config.gin",
        "outputs.jsonl",
        "results.json",
    ]


@pytest.fixture(name="two", scope="module")
def _two(folder: Path) -> Path:
    """An uninterrupted run of two hosts."""
    run = finish(folder, folder / "two", TWO)
    assert "[stage2] 9/9" in run.said[0] and run.said[1] == ""
    return folder / "two"


def before_stage2(two: Path, workdir: Path) -> Path:
    """Copies the uninterrupted run as it was when its stage 1 was finished, to save the time of that stage."""
    shutil.copytree(two, workdir)
    for path in (workdir / "results.json", workdir / CELL / "results.json"):
        path.unlink()
    shutil.rmtree(workdir / CELL / "stage2")
    return workdir


@pytest.mark.slow
def test_two_hosts_equal_one(folder: Path, two: Path) -> None:
    finish(folder, folder / "one", Mesh(1, 8))
    check_close(two, folder / "one")


@pytest.mark.slow
def test_hosts_as_slices_change_nothing(folder: Path, two: Path) -> None:
    workdir = folder / "slices"
    files = [f"--gin_file={folder}/hosts_{TWO}.gin", "--gin_file=meshes/slices.gin"]
    run = Run(folder, workdir, TWO, [*tiny.command(folder, "demo.gin", workdir), *files])
    assert run.end() == [0, 0], run.complaints()
    assert "SLICES = 2" in (workdir / "operative_config.gin").read_text()
    check_close(workdir, two)


@pytest.mark.slow
def test_a_run_moves_between_meshes(folder: Path, two: Path) -> None:
    """Preempted on one mesh, resumed on the next, in both stages."""
    workdir = folder / "moved"
    moments = {
        Mesh(1, 1): r"\[stage1\] 3/5",
        Mesh(4, 2): r"\[stage2\] 1/9",
        Mesh(1, 8): r"\[stage2\] 4/9",
    }
    for mesh, moment in moments.items():
        run = Run(folder, workdir, mesh)
        interrupt(run, moment, mesh.count - 1, signal.SIGTERM)
        assert run.end() == [main.PREEMPTED] * mesh.count, run.complaints()
    run = finish(folder, workdir, TWO)
    assert re.search(r"\[stage2\] resumes from step [456] in ", run.said[0])
    check_close(workdir, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        pytest.param(0, r"\[stage2\] 3/9", id="host 0, a step"),
        pytest.param(1, r"\[stage2\] step 4:", id="host 1, after an evaluation"),
    ],
)
def test_sigterm_saves_on_all_hosts(folder: Path, two: Path, victim: int, moment: str) -> None:
    workdir = before_stage2(two, folder / f"preempted_{victim}")
    run = Run(folder, workdir, TWO)
    begin = interrupt(run, moment, victim, signal.SIGTERM)
    assert run.end() == [main.PREEMPTED] * 2, run.complaints()
    assert time.monotonic() - begin < 60
    for errors in run.errors:
        assert re.search(
            r"preempted; the state of step \d is saved\. The same command resumes the run\.", errors.read_text()
        )
    finish(folder, workdir, TWO)
    check_same(workdir, two)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_others(folder: Path, two: Path, victim: int) -> None:
    workdir = before_stage2(two, folder / f"killed_{victim}")
    run = Run(folder, workdir, TWO)
    begin = interrupt(run, r"\[stage2\] 3/9", victim, signal.SIGKILL)
    other = 1 - victim
    status = run.hosts[other].wait(60)
    assert time.monotonic() - begin < 60
    assert run.end()[victim] == -signal.SIGKILL
    message = rf"Lost host {victim} \({socket.gethostname()}\): its process ended, .*the same command resumes"
    assert status == hosts.LOST and re.search(message, run.errors[other].read_text()), run.complaints()
    finish(folder, workdir, TWO)
    check_same(workdir, two)


@pytest.mark.slow
def test_a_failing_host_ends_the_others_with_its_reason(folder: Path, tmp_path: Path) -> None:
    """A stage's settings are read by host 0 alone, and its refusal reaches all."""
    workdir = tmp_path / "run"
    stage = workdir / CELL / "stage1"
    stage.mkdir(parents=True)
    (stage / "settings.json").write_text("{")
    run = Run(folder, workdir, TWO)
    assert run.end(300) == [2, 2], run.complaints()
    for errors in run.errors:
        assert "settings.json' cannot be read as JSON" in errors.read_text()
