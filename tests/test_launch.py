"""The launchers: a dry run prints what a run executes, odd values survive, a mistake gives one error message."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compilation
import processes
import pytest
import tiny

from promot_jax import main
from promot_jax.config import binding, gin_files

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
JOB = [
    "--gin_file=promot.gin",
    "--workdir=/mnt/a b",
    '--gin.TASK_FEATURE_LENGTHS={"inputs": 512}',
    "--gin.TASK=it's $5",
]
# What is needed besides the job, by launcher.
NEEDED = {
    "local": [],
    "tpu_vm": ["--name=pod", "--zone=us-east5-a"],
    "gke": ["--name=first", "--cluster=c", "--tpu_type=v5litepod-64", "--image=gcr.io/p/i:1"],
    "slurm": ["--nodes=2", "--gpus_per_node=4"],
    "cache_tasks": ["--module=my_tasks", "--tasks=a,b", "--cache_dir=gs://bucket/cache"],
}
JOB_QUOTED = (
    "--gin_file=promot.gin '--workdir=/mnt/a b' "
    """'--gin.TASK_FEATURE_LENGTHS={"inputs": 512}' '--gin.TASK=it'\\''s $5'"""
)
GOLDEN = {
    "local --processes=3 --devices=2 --port=9 --python=py": f"""\
mkdir -p runs/logs
env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 py -m promot_jax.main {JOB_QUOTED} \
--coordinator=127.0.0.1:9 --num_hosts=3 --host_id=0 > >(trap '' TERM; exec tee -a runs/logs/host_0.log) 2>&1 &
env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 py -m promot_jax.main {JOB_QUOTED} \
--coordinator=127.0.0.1:9 --num_hosts=3 --host_id=1 >>runs/logs/host_1.log 2>&1 &
env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 py -m promot_jax.main {JOB_QUOTED} \
--coordinator=127.0.0.1:9 --num_hosts=3 --host_id=2 >>runs/logs/host_2.log 2>&1 &
wait
""",
    "tpu_vm --name=pod --zone=us-east5-a": """\
gcloud compute tpus tpu-vm ssh pod --worker=all --zone=us-east5-a '--command=cd promot_jax && \
.venv/bin/python -m promot_jax.main --gin_file=promot.gin '\\''--workdir=/mnt/a b'\\'' \
'\\''--gin.TASK_FEATURE_LENGTHS={"inputs": 512}'\\'' '\\''--gin.TASK=it'\\''\\'\\'''\\''s $5'\\'' \
> >(trap "" TERM; exec tee -a host.log) 2>&1'
""",
    "tpu_vm --queued_resource=q --zone=z --project=p --setup --gcloud=--internal-ip": f"""\
git -C {ROOT} archive --format=tar.gz --prefix=promot_jax/ --output=/tmp/promot_jax-{os.getuid()}.tar.gz HEAD
gcloud compute tpus queued-resources scp /tmp/promot_jax-{os.getuid()}.tar.gz q:promot_jax.tar.gz --node=all \
--worker=all --zone=z --project=p --internal-ip
gcloud compute tpus queued-resources ssh q --node=all --worker=all --zone=z --project=p --internal-ip \
'--command=rm -rf promot_jax/promot_jax promot_jax/tasks promot_jax/gin && tar -xzf promot_jax.tar.gz && \
cd promot_jax && python3 -m pip install --user --upgrade uv && \
~/.local/bin/uv venv --clear --python 3.12 .venv && \
~/.local/bin/uv pip install --python .venv/bin/python -e '\\''.[tpu]'\\'''
gcloud compute tpus queued-resources ssh q --node=all --worker=all --zone=z --project=p --internal-ip \
'--command=cd promot_jax && \
.venv/bin/python -m promot_jax.main --gin_file=promot.gin '\\''--workdir=/mnt/a b'\\'' \
'\\''--gin.TASK_FEATURE_LENGTHS={{"inputs": 512}}'\\'' '\\''--gin.TASK=it'\\''\\'\\'''\\''s $5'\\'' \
> >(trap "" TERM; exec tee -a host.log) 2>&1'
""",
    "gke --name=first --cluster=c --tpu_type=v5litepod-64 --image=i --slices=2 --zone=z --xpk=--spot": """\
xpk workload create --workload=first --cluster=c --zone=z --tpu-type=v5litepod-64 --num-slices=2 --docker-image=i \
--max-restarts=10 --restart-on-exit-codes=75,76 --termination-grace-period-seconds=300 --spot \
'--command=exec python -m promot_jax.main --gin_file=promot.gin '\\''--workdir=/mnt/a b'\\'' \
'\\''--gin.TASK_FEATURE_LENGTHS={"inputs": 512}'\\'' '\\''--gin.TASK=it'\\''\\'\\'''\\''s $5'\\'''
""",
    "slurm --nodes=2 --gpus_per_node=4 --sbatch=--time=12:00:00 --sbatch=--account=me --restarts=3": f"""\
sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=4 --job-name=promot_jax --requeue \
--open-mode=append --signal=TERM@300 --time=12:00:00 --account=me {LAUNCH}/slurm_job.sh 3 \
srun --kill-on-bad-exit=0 --wait=300 --label --cpus-per-task=4 python -m promot_jax.main {JOB_QUOTED}
""",
    "slurm --nodes=2 --gpus_per_node=4 --process_per=node --cpus_per_process=32 --python=/env/bin/python": f"""\
sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32 --job-name=promot_jax --requeue \
--open-mode=append --signal=TERM@300 {LAUNCH}/slurm_job.sh 10 \
srun --kill-on-bad-exit=0 --wait=300 --label --cpus-per-task=32 env JAX_LOCAL_DEVICE_IDS=0,1,2,3 \
/env/bin/python -m promot_jax.main {JOB_QUOTED}
""",
    "cache_tasks --module=my_tasks --tasks=a,b --cache_dir=gs://bucket/cache": """\
python -m seqio.scripts.cache_tasks_main --module_import=my_tasks --tasks=a,b '--excluded_tasks=.*_[0-9]+shot' \
--output_cache_dir=gs://bucket/cache --min_shards=64 --pipeline_options=--runner=DirectRunner --alsologtostderr
""",
    "cache_tasks --module=m --tasks=a --cache_dir=c --shards=8 --beam=--runner=DataflowRunner --beam=--region=r": """\
python -m seqio.scripts.cache_tasks_main --module_import=m --tasks=a '--excluded_tasks=.*_[0-9]+shot' \
--output_cache_dir=c --min_shards=8 --pipeline_options=--runner=DataflowRunner,--region=r --alsologtostderr
""",
}
# Stands in for any command: notes its words, and does what the environment asks of it, `{"words of it": [action]}`, an
# action per call: a status to end with, "wait" for SIGTERM and end with 75, or "ignore" that. A status is followed once
# as many commands as FAKE_NOTED have begun.
FAKE = """\
#!{python}
import json, os, signal, sys, time
def end(signum, frame):
    print("told to stop", flush=True)
    sys.exit(75)
notes = os.environ["FAKE_NOTES"]
with open(notes + ".pid", "w") as file:
    file.write(str(os.getpid()))
def noted(words=""):
    with open(notes, "a+") as file:
        file.seek(0)
        return sum(words in " ".join(json.loads(line)) for line in file)
command = " ".join(sys.argv)
action = 0
for words, actions in json.loads(os.environ.get("FAKE_ACTIONS", "{{}}")).items():
    if words in command:
        action = actions[min(noted(words), len(actions) - 1)]
        break
signal.signal(signal.SIGTERM, signal.SIG_IGN if action == "ignore" else end)
with open(notes, "a") as file:  # from here on it does with signals as it is told
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print("said by", command, flush=True)
while action in ("wait", "ignore") or noted() < int(os.environ.get("FAKE_NOTED", 0)):
    time.sleep(0.05)
sys.exit(action)
"""


class Machine:
    """Where a launcher runs: a folder, and stand-ins for the commands of clouds and clusters that note their words."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "sbatch", "scontrol", "srun", "python", "git"):
            (self.bin / name).write_text(FAKE.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        hidden = ("XLA_FLAGS", "TMPDIR", "SLURM_RESTART_COUNT")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKE_NOTES": str(folder / "notes")}

    def start(self, *command: str, actions: dict[str, list[Any]] | None = None) -> "subprocess.Popen[str]":
        """Starts a command here; `actions` as in `FAKE`."""
        environment = self.environment | {"FAKE_ACTIONS": json.dumps(actions or {})}
        pipe = subprocess.PIPE
        return processes.start(list(command), cwd=self.folder, env=environment, stdout=pipe, stderr=pipe)

    def run(self, *command: str, actions: dict[str, list[Any]] | None = None) -> "subprocess.CompletedProcess[str]":
        """Runs a command here to its end."""
        process = self.start(*command, actions=actions)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def notes(self) -> list[list[str]]:
        """The words of the commands that ran since the last call."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def launcher(name: str, *arguments: str) -> list[str]:
    return [str(LAUNCH / f"{name}.sh"), *arguments]


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.05)


@pytest.mark.parametrize("words", GOLDEN)
def test_dry_run(words: str, machine: Machine) -> None:
    name, *options = words.split()
    done = machine.run(*launcher(name, "--dry_run", *options, *(JOB if name != "cache_tasks" else [])))

    assert (done.stdout, done.stderr, done.returncode) == (GOLDEN[words], "", 0)
    assert machine.notes() == [] and not (machine.folder / "runs").exists()


@pytest.mark.parametrize("words", GOLDEN)
def test_what_is_printed_is_what_is_run(words: str, machine: Machine) -> None:
    name, *options = words.split()
    command = launcher(name, *options, *(JOB if name != "cache_tasks" else []))
    if "--python=" in words:
        command = [word for word in command if not word.startswith("--python=")]

    assert machine.run(*command).returncode == 0
    run = machine.notes()
    printed = machine.run(*command, "--dry_run").stdout
    assert machine.notes() == []
    machine.run("bash", "-c", printed)  # pasted

    assert len(run) == printed.count("\n") - 2 * (name == "local") and sorted(machine.notes()) == sorted(run)


def test_odd_values_reach_the_job(machine: Machine) -> None:
    for name in ("local", "tpu_vm", "gke", "slurm"):
        odd = [*JOB, *(["--gin.MORE=a\nb"] if name != "gke" else []), '--gin.X=`"\\', "--", "--heartbeat_timeout=5"]
        machine.run(*launcher(name, *NEEDED[name], *odd))
        words = machine.notes()[-1]
        if name in ("tpu_vm", "gke"):  # a shell over there
            inner = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
            (machine.folder / "promot_jax" / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
            (machine.folder / "promot_jax" / ".venv" / "bin" / "python").unlink(missing_ok=True)
            (machine.folder / "promot_jax" / ".venv" / "bin" / "python").symlink_to(machine.bin / "python")
            machine.run("bash", "-c", inner)
            (words,) = machine.notes()
        start = words.index("promot_jax.main") + 1
        odd.remove("--")
        assert words[start : start + len(odd)] == odd, name


@pytest.mark.parametrize(
    ("words", "part"),
    [
        *[(f"{name} ", "--gin_file=VALUE is missing") for name in NEEDED if name != "cache_tasks"],
        ("local --processes --gin_file=a", "--processes has no value, or is no option"),
        ("local --proceses=2 --gin_file=a", "no option --proceses=VALUE"),
        ("local --processes=0 --gin_file=a", "--processes is a whole number of at least 1, not '0'"),
        ("local --devices=four --gin_file=a", "--devices is a whole number of at least 1, not 'four'"),
        ("local --restarts=-1 --gin_file=a", "--restarts is a whole number of at least 0, not '-1'"),
        ("local --gin_file a", "--gin_file has no value"),
        ("local --gin_file=", "no option --gin_file=VALUE"),
        ("local --gin_file=a --gin.STEPS 3", "--gin.STEPS has no value"),
        ("local promot.gin", "'promot.gin' is no option"),
        ("local --gin_file=a --log_dir=", "--log_dir=VALUE is missing"),
        ("tpu_vm --gin_file=a", "--workdir=VALUE is missing"),
        ("tpu_vm --gin_file=a --workdir=b --zone=", "--zone=VALUE is missing"),
        ("tpu_vm --gin_file=a --workdir=b --name=", "either --name=NAME"),
        ("tpu_vm --gin_file=a --workdir=b --queued_resource=q", "either --name=NAME"),
        ("tpu_vm --gin_file=a --workdir=b --setup=now", "no option --setup=VALUE"),
        ("gke --gin_file=a", "--workdir=VALUE is missing"),
        ("gke --gin_file=a --workdir=b --image=", "--image=VALUE is missing"),
        ("gke --gin_file=a --workdir=b --gin.X=a\nb", "no value with a line break"),
        ("slurm --gin_file=a --process_per=job", "--process_per is gpu or node, not 'job'"),
        ("slurm --gin_file=a --nodes=", "--nodes=VALUE is missing"),
        ("cache_tasks --module=", "--module=VALUE is missing"),
        ("cache_tasks --gin_file=a", "'--gin_file=a' belongs to promot_jax.main"),
    ],
)
def test_mistake_is_one_sentence(words: str, part: str, machine: Machine) -> None:
    name, *options = words.split(" ")
    done = machine.run(*launcher(name, *NEEDED[name], *filter(None, options)))

    assert done.returncode == 2 and done.stdout == "" and machine.notes() == []
    assert done.stderr.startswith(f"{name}.sh: ") and part in done.stderr and done.stderr.count("\n") == 1


def test_a_command_that_is_not_installed(machine: Machine) -> None:
    (machine.bin / "sbatch").unlink()
    done = machine.run(*launcher("slurm", *NEEDED["slurm"], *JOB))
    assert (done.returncode, done.stderr) == (2, "slurm.sh: sbatch is not installed on this machine.\n")


@pytest.mark.parametrize("name", NEEDED)
def test_help_names_every_option(name: str, machine: Machine) -> None:
    done = machine.run(*launcher(name, "--help"))
    script = (LAUNCH / f"{name}.sh").read_text()
    options = re.findall(r"\[(\w+)\]=", re.search(r"^option=\((.*?)\)$", script, re.M | re.S)[1])  # type: ignore[index]
    options += re.findall(r"^repeatable=(\w+)", script, re.M)

    assert done.returncode == 0 and len(options) > 4 and "#" not in done.stdout and "set -" not in done.stdout
    assert [option for option in [*options, "dry_run"] if f"\n  --{option}" not in done.stdout] == []
    assert f"launch/{name}.sh " in done.stdout


# ---- local processes -------------------------------------------------------------------------------------------------


def local(*more: str) -> list[str]:
    return launcher("local", "--gin_file=promot.gin", "--grace=3", *more)


def test_local_keeps_a_log_per_process(machine: Machine) -> None:
    done = machine.run(*local("--processes=2"))

    assert done.returncode == 0 and "--host_id=0" in done.stdout and "--host_id=1" not in done.stdout
    logs = {path.name: path.read_text() for path in (machine.folder / "runs" / "logs").iterdir()}
    assert logs.keys() == {"host_0.log", "host_1.log"} and logs["host_0.log"] == done.stdout
    assert all(f"--host_id={i}" in logs[f"host_{i}.log"] for i in range(2))


@pytest.mark.parametrize("other", ["wait", "ignore"])
def test_local_ends_the_others_when_one_fails(other: str, machine: Machine) -> None:
    start = time.monotonic()
    machine.environment["FAKE_NOTED"] = "2"
    done = machine.run(*local("--restarts=3"), actions={"--host_id=0": [other], "--host_id=1": [3]})

    assert done.returncode == 3 and len(machine.notes()) == 2 and time.monotonic() - start < 20
    first, _, killed = done.stderr.partition("\n")
    assert first == "local.sh: process 1 ended with status 3, see runs/logs/host_1.log."
    assert ("Killed" in killed) == (other == "ignore")  # bash says so
    assert ("told to stop" in done.stdout) == (other == "wait")


def test_local_starts_again_after_a_preemption(machine: Machine) -> None:
    both = {"--host_id=0": [75, 75, 0], "--host_id=1": [75, 75, 0]}
    done = machine.run(*local("--restarts=2"), actions=both)
    assert done.returncode == 0 and done.stderr.count("starting again") == 2 and len(machine.notes()) == 6

    done = machine.run(*local("--restarts=1"), actions=both)
    assert done.returncode == 75 and done.stderr.count("starting again, 1 of 1") == 1 and len(machine.notes()) == 4
    assert machine.run(*local(), actions={"--host_id": [75]}).returncode == 75


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_on(sent: signal.Signals, status: int, machine: Machine) -> None:
    for action, expected in (("wait", 75), ("ignore", status)):
        process = machine.start(*local("--restarts=3"), actions={"--host_id": [action]})
        for host in range(2):
            wait_for(machine.folder / "runs" / "logs" / f"host_{host}.log", "said by")
        process.send_signal(sent)
        deadline = time.monotonic() + 20
        while action == "ignore" and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
            process.send_signal(sent)  # once more: by force
        out, _ = process.communicate(timeout=20)
        assert process.returncode == expected and ("told to stop" in out) == (action == "wait")
        assert len(machine.notes()) == 2
        for log in (machine.folder / "runs" / "logs").iterdir():
            log.unlink()


# ---- pods and clusters -----------------------------------------------------------------------------------------------


def test_tpu_vm_starts_again_after_a_preemption(machine: Machine) -> None:
    command = launcher("tpu_vm", *NEEDED["tpu_vm"], *JOB)
    done = machine.run(*command, actions={"ssh": [75, 75, 1]})
    assert done.returncode == 1 and done.stderr.count("starting again") == 2 and len(machine.notes()) == 3
    done = machine.run(*command, "--restarts=0", actions={"ssh": [75]})
    assert done.returncode == 75 and len(machine.notes()) == 1


def test_tpu_vm_runs_nothing_when_the_setup_fails(machine: Machine) -> None:
    done = machine.run(*launcher("tpu_vm", *NEEDED["tpu_vm"], "--setup", *JOB), actions={"scp": [4]})
    assert done.returncode == 4 and [words[0] for words in machine.notes()] == ["git", "gcloud"]


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(75, 1, True), (75, 0, False), (1, 9, False), (0, 9, False)]
)
def test_slurm_job_requeues_after_a_preemption(status: int, restarts: int, requeued: bool, machine: Machine) -> None:
    machine.environment["SLURM_JOB_ID"] = "17"
    done = machine.run(
        str(LAUNCH / "slurm_job.sh"), str(restarts), "srun", "--label", "a b", actions={"srun": [status]}
    )
    assert done.returncode == status
    assert machine.notes() == [["srun", "--label", "a b"], *([["scontrol", "requeue", "17"]] if requeued else [])]


def test_slurm_job_outlives_what_ends_its_steps(machine: Machine) -> None:
    machine.environment |= {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}
    for restarts, calls in (("3", 2), ("2", 1)):
        process = machine.start(str(LAUNCH / "slurm_job.sh"), restarts, "srun", actions={"srun": ["wait"]})
        wait_for(machine.folder / "notes", "srun")
        time.sleep(0.3)
        for pid in (process.pid, int((machine.folder / "notes.pid").read_text())):
            os.kill(pid, signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == 75 and len(machine.notes()) == calls


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_local_runs_a_job(tmp_path: Path) -> None:
    """Stage 1 on the tiny model, as two processes of two devices each."""
    workspace = tiny.workspace(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = launcher("local", "--processes=2", "--devices=2", f"--port={port}", f"--python={sys.executable}")
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [*command, *tiny.command(workspace, "promot_stage1.gin", tmp_path / "run", TRAIN_STEPS=2, ICL_MIXTURE="")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": compilation.flags()},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr + (tmp_path / "runs" / "logs" / "host_1.log").read_text()
    assert "Devices: 4 cpu" in done.stdout and (tmp_path / "run" / "prompt" / "prompt.npy").is_file()
    assert (tmp_path / "runs" / "logs" / "host_0.log").read_text() == done.stdout


def test_documented(tmp_path: Path) -> None:
    """Every command of the page is one that its launcher takes, and its gin file and settings bind."""
    page = (ROOT / "docs" / "pods.md").read_text("utf-8")
    commands = re.findall(r"^launch/(\w+)\.sh ((?:.*\\\n)*.*)$", page, re.M)
    (tmp_path / "rte.gin").write_text(re.search(r"^```\n(include .*?)^```", page, re.M | re.S)[1])  # type: ignore[index]

    assert {name for name, _ in commands} == set(NEEDED)
    for name, rest in commands:
        words = shlex.split(rest.replace("\\\n", " "))
        assert subprocess.run([*launcher(name, "--dry_run"), *words], capture_output=True).returncode == 0, words
        values, overrides = main.parse_flags([word for word in words if word.startswith("--gin")])
        files = [
            gin_files.find(Path(path).name if "/mnt" in path else path, (tmp_path, gin_files.folder()))
            for path in values.gin_file
        ]
        if files:
            binding.bind(main.CONFIGURABLES, files, overrides)
