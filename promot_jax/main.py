"""Runs one job: reads the flags and the gin files, builds what they describe, calls it.

    python -m promot_jax.main --gin_file=promot_stage1.gin --gin.TRAIN_STEPS=200 --workdir=runs/first

gin is imported in `promot_jax/config/` only, and is over before the job starts: every `@Stage()` is built by then, and
the job is a plain function called with plain arguments. `CONFIGURABLES` lists the names a gin file may use. They are
checked first, so that a typo costs no waiting: one sentence on stderr, exit status 2. Then the modules of the names in
use are imported, and no others. A run that fails ends with status 1. On SIGTERM, Ctrl-C, or the cloud's notice that it
takes the machine away, a run saves its state at the next step and ends with status 75, after Ctrl-C with 130: start the
same command again, and it goes on from there.

On several hosts the same command runs on each. They are found from TPU VM, GKE, Slurm and Open MPI, or given by flags.
Host 0 prints and writes the reports; checkpoints are written by all, so `--workdir` lies on storage that all share.
When a host is gone, the others name it and end with status 76 (1 if it said why it failed) within
`--heartbeat_timeout` and a few seconds.
"""

import contextlib
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from promot_jax import files
from promot_jax.config import binding, gin_files
from promot_jax.distributed import compilation_cache, hosts, preemption
from promot_jax.errors import PreemptedError, StorageError, TakenOverError, TrainingError, UserError, nearest
from promot_jax.sweep import leases

# Every name a gin file may use, and where it lives. A job takes `workdir` and what else it needs. None of these modules
# may import TensorFlow at its top: that takes seconds, and the arguments have not been checked yet.
CONFIGURABLES = {
    "train_stage": "promot_jax.jobs.train:train_stage",
    "promot": "promot_jax.jobs.train:promot",
    "train_method": "promot_jax.jobs.train:train_method",
    "compare": "promot_jax.jobs.compare:compare",
    "icl_eval": "promot_jax.jobs.icl_eval:icl_eval",
    "infer": "promot_jax.jobs.infer:infer",
    "chat": "promot_jax.jobs.chat:chat",
    "export": "promot_jax.jobs.export:export",
    "precompile": "promot_jax.jobs.precompile:precompile",
    "inspect_data": "promot_jax.jobs.inspect_data:inspect_data",
    "gradient_alignment": "promot_jax.jobs.gradient_alignment:gradient_alignment",
    "Experiment": "promot_jax.experiments.settings:experiment",
    "DataFile": "promot_jax.data.files:DataFile",
    "DecoderConfig": "promot_jax.models.decoder_config:DecoderConfig",
    "T5Config": "promot_jax.models.t5:T5Config",
    "Evaluation": "promot_jax.evaluation.settings:Evaluation",
    "Decoding": "promot_jax.decoding.settings:Decoding",
    "PromptInit": "promot_jax.params.soft_prompts:PromptInit",
    "Tracker": "promot_jax.trackers.settings:Tracker",
    "Partitioner": "promot_jax.distributed.partitioning:Partitioner",
    "Training": "promot_jax.training.settings:Training",
    "Tuning": "promot_jax.training.settings:tuning",
    "Lora": "promot_jax.params.lora:Lora",
    "Replay": "promot_jax.data.replay:Replay",
    "Optimizer": "promot_jax.training.optimizer:Optimizer",
}

TIMEOUTS = (
    ("start_timeout", 300, "seconds for hosts to join"),
    ("heartbeat_timeout", 30, "seconds without a sign of life"),
    ("barrier_timeout", 600, "seconds at a common point"),
)
PREEMPTED = 75  # exit status: EX_TEMPFAIL, "try again later"
INTERRUPTED = 130  # exit status, as shells have it
GRACE = 10.0  # seconds that other threads get to end after a save that failed
_cannot_save = False  # whether a save of this process has failed
SHARED = ("compare",)  # jobs of which several processes work in one workdir; of others the second is refused

USAGE = """\
python -m promot_jax.main --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--workdir=FOLDER]

  --gin_file        a gin file, looked for here and then among those below; may repeat, a later one wins
  --gin.NAME=VALUE  sets a macro (--gin.TRAIN_STEPS=9) or a parameter (--gin.Experiment.seed=1); strings need no quotes
  --gin_file=X --help   shows the macros of a run: what --gin.NAME=VALUE can set
  --workdir         where the run writes and resumes from (default: runs/<name of the gin file>)

Several hosts (found by themselves on TPU VM, GKE, Slurm and Open MPI; --num_hosts=1 runs alone there too):
  --coordinator=HOST:PORT --num_hosts=N --host_id=I   where host 0 is to be reached, how many there are, which this is
  --start_timeout, --heartbeat_timeout, --barrier_timeout   seconds (300, 30, 600) to wait for hosts: to join, for a
                    sign of life, at a common point
  --preemption_notice   "auto" (on Google Cloud), "off", or an address that says TRUE ahead of a preemption

Gin files: one of the runs; a part may follow it (--gin_file=promot.gin --gin_file=models/llama3_8b.gin).

"""


def parse_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[tuple[str, str]]]:
    """Returns the flags, and name and value of each `--gin.NAME=VALUE`; a `UserError` names an unknown flag."""
    overrides, others = [], ["main"]
    for argument in argv:
        match = re.fullmatch(r"--?gin\.([\w./]+)=(.*)", argument, flags=re.S)
        if match:
            overrides.append((match[1], match[2]))
        elif argument.startswith(("--gin.", "-gin.")):
            raise UserError(f"{argument} has no value: write --gin.NAME=VALUE, without spaces.")
        else:
            others.append(argument)
    values = flags.FlagValues()
    flags.DEFINE_multi_string("gin_file", [], "gin files", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of host 0", flag_values=values)
    flags.DEFINE_integer("num_hosts", 0, "hosts of the run", flag_values=values, lower_bound=0)
    flags.DEFINE_integer("host_id", -1, "number of this host", flag_values=values, lower_bound=-1)
    for name, seconds, what in TIMEOUTS:
        flags.DEFINE_float(name, seconds, what, lower_bound=0, upper_bound=1e6, flag_values=values)
    flags.DEFINE_string("preemption_notice", "auto", "where a preemption is announced", flag_values=values)
    flags.DEFINE_bool("help", False, "show the flags and the gin files", short_name="h", flag_values=values)
    try:
        rest = values(others)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.upper() in gin_files.macros_of_package():
            raise UserError(f"There is no flag --{name}: settings are given as --gin.{name.upper()}=VALUE.") from error
        raise UserError(f"There is no flag --{name}{nearest(name, list(values))}.") from error
    except flags.Error as error:
        raise UserError(f"{error}.") from error
    if rest:
        name, equals, value = rest[0].partition("=")
        form = f"--gin.{name}={value}" if equals else "--gin.NAME=VALUE"
        advice = f"give it as --gin_file={name}" if name.endswith(".gin") else f"settings are given as {form}"
        raise UserError(f"{rest[0]!r} is no flag: {advice}.")
    if any(math.isnan(float(values[name].value or 0)) for name, *_ in TIMEOUTS):
        raise UserError("A timeout is a number of seconds, not nan.")
    return values, overrides


def run(argv: Sequence[str]) -> int:
    """Runs the job that the arguments ask for, and returns 0, or 2 when they ask for none."""
    values, overrides = parse_flags(argv)
    paths = [gin_files.find(name, (Path(), gin_files.folder())) for name in values.gin_file]
    if values.help and paths:
        print(f"Macros of this run, set with --gin.NAME=VALUE:\n{gin_files.macros_of_run(paths, overrides)}")
        return 0
    if values.help or not paths:
        print(USAGE + gin_files.listing(), file=sys.stdout if values.help else sys.stderr)
        return 0 if values.help else 2
    job = binding.bind(CONFIGURABLES, paths, overrides)
    workdir = Path(values.workdir or Path("runs") / "-".join(path.stem for path in paths))
    timeouts: dict[str, Any] = {name: values[name].value for name, *_ in TIMEOUTS}
    hosts.join(values.coordinator, values.num_hosts, values.host_id, **timeouts)
    compilation_cache.use()
    with preemption.heeded(preemption.notice_address(values.preemption_notice)):
        try:
            with _one_voice():
                _run_in(workdir, job)
            status = 0
        except PreemptedError as stop:
            print(f"{stop} The same command resumes the run.", file=sys.stderr, flush=True)
            status = INTERRUPTED if preemption.interrupted() else PREEMPTED
        hosts.leave()
    return status


def _run_in(workdir: Path, job: partial[Any]) -> None:
    """Calls the job in its folder."""
    hosts.decide(lambda: _prepare(workdir), "the workdir")
    hosts.check_shared(workdir)
    flags.FLAGS.mark_as_parsed()  # libraries may read the flags they define
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        hosts.decide(lambda: _occupy(workdir, job, stack), "who works in the workdir")
        job(workdir=workdir)
        if hosts.is_writer():
            binding.write(workdir)
    written = "  ".join(sorted(path.name + "/" * path.is_dir() for path in workdir.iterdir()))
    print(f"Done after {time.monotonic() - start:.0f} s. {workdir}/ holds: {written}", flush=True)


def _occupy(workdir: Path, job: partial[Any], stack: contextlib.ExitStack) -> None:
    """Keeps other runs out of the workdir until the stack is closed."""
    if job.func.__name__ not in SHARED:
        stack.enter_context(leases.alone(workdir))
    elif owner := leases.owner(workdir, leases.STALE):
        raise UserError(leases.in_use(workdir, owner))


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Of several hosts host 0 alone prints: all would say the same. What gloo prints from within C++ goes to stderr."""
    if hosts.count() == 1:
        yield
        return
    with os.fdopen(os.dup(1), "w") if hosts.is_writer() else open(os.devnull, "w") as out:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(out):
            yield


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Drops what Python prints of two errors in callbacks, which are said otherwise.

    Of Ctrl-C the flag counts (`distributed.preemption`). Of a save that fails, tensorstore prints a traceback for each
    other array that it was writing.
    """
    before = sys.unraisablehook

    def print_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = print_others
    try:
        yield
    finally:
        if sys.unraisablehook is print_others:
            sys.unraisablehook = before


def _prepare(workdir: Path) -> None:
    """Makes the workdir, deletes what killed runs left half written, and says in a new one what will run there."""
    files.check_workdir(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.delete_leftovers(workdir)
        if not any(workdir.iterdir()):  # the job may yet refuse to go on in a folder of other settings
            binding.write(workdir)
    except OSError as error:
        if error.errno in files.FULL:
            raise
        raise UserError(f"Cannot write to the workdir {workdir}: {error.strerror}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (default: the command line) and returns the exit status; errors become one sentence on stderr."""
    global _cannot_save
    if argv is None and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where task modules are, as with python -m
    try:
        with preemption.interruptible():
            return run(sys.argv[1:] if argv is None else argv)
    except (UserError, TrainingError) as error:
        message = str(error).partition("\n  In call to configurable")[0]  # gin appends this
        message = " ".join(message.split())
        _cannot_save = isinstance(error, StorageError)
        status = 2 if isinstance(error, UserError) else PREEMPTED if isinstance(error, TakenOverError) else 1
        hosts.fail(error, message, status)
        print(message, file=sys.stderr, flush=True)
        return status
    except OSError as error:
        if error.errno is None:  # not the system's
            hosts.fail(error, traceback.format_exc(), 1)
            raise
        message = _of_the_system(error)
        hosts.fail(error, message, 1)
        print(message, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as error:
        message = "Interrupted. The same command resumes the run."
        hosts.fail(error, message, INTERRUPTED)
        print(message, file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        hosts.fail(error, traceback.format_exc(), 1)
        raise
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again at exit, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _of_the_system(error: OSError) -> str:
    """What is said of a full disk, a folder that was deleted meanwhile, or an output that nobody reads."""
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "Nobody reads the output any more; give it a file to write to, and the same command resumes the run."
    where = f" {str(error.filename)!r}" if error.filename is not None else ""
    return (
        f"Cannot read or write{where}: {error.strerror}; what was saved before is whole, and once that is mended, the "
        "same command resumes the run."
    )


def command() -> None:
    """As `main`, and ends the process.

    After a save that failed, Orbax's threads would keep it for ten minutes, waiting for a folder that they could not
    make, and print tracebacks of what they could not write.
    """
    with _quiet_callbacks():
        status = main()
        if _cannot_save:
            with contextlib.suppress(KeyboardInterrupt):
                _wait_for_threads()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def _wait_for_threads() -> None:
    """Gives other threads that would keep the process some seconds to end."""
    others = {thread for thread in threading.enumerate() if not thread.daemon} - {threading.main_thread()}
    until = time.monotonic() + GRACE
    while any(thread.is_alive() for thread in others) and time.monotonic() < until:
        time.sleep(0.1)


if __name__ == "__main__":
    command()
