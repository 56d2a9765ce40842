"""Runs one job: reads the flags and the gin files, builds what they describe, calls it.

    python -m promot_jax.main --gin_file=promot_stage1.gin --gin.TRAIN_STEPS=200 --workdir=runs/first

gin is imported in `promot_jax/config/` only, and is over before the job starts: every `@Stage()` is built by then, and
the job is a plain function called with plain arguments. `CONFIGURABLES` lists the names a gin file may use. They are
checked first, so that a typo costs no waiting: one sentence on stderr, exit status 2. Then the modules of the names in
use are imported, and no others. A run that fails ends with status 1, an interrupted one with 130. On SIGTERM, or the
cloud's notice that it takes the machine away, a run saves its state at the next step and ends with status 75: start the
same command again, and it goes on from there.

On several hosts the same command runs on each. They are found from TPU VM, GKE, Slurm and Open MPI, or given by flags.
Host 0 prints and writes the reports; checkpoints are written by all, so `--workdir` lies on storage that all share.
When a host is gone, the others name it and end with status 76 (1 if it said why it failed) within
`--heartbeat_timeout` and a few seconds.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from promot_jax import files
from promot_jax.config import binding, gin_files
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import PreemptedError, TrainingError, UserError, nearest

# Every name a gin file may use, and where it lives. A job takes `workdir` and what else it needs. None of these modules
# may import TensorFlow at its top: that takes seconds, and the arguments have not been checked yet.
CONFIGURABLES = {
    "train_stage": "promot_jax.jobs.train:train_stage",
    "promot": "promot_jax.jobs.train:promot",
    "train_method": "promot_jax.jobs.train:train_method",
    "compare": "promot_jax.jobs.compare:compare",
    "icl_eval": "promot_jax.jobs.icl_eval:icl_eval",
    "infer": "promot_jax.jobs.infer:infer",
    "export": "promot_jax.jobs.export:export",
    "precompile": "promot_jax.jobs.precompile:precompile",
    "gradient_alignment": "promot_jax.jobs.gradient_alignment:gradient_alignment",
    "Experiment": "promot_jax.experiments.settings:Experiment",
    "DecoderConfig": "promot_jax.models.decoder:DecoderConfig",
    "T5Config": "promot_jax.models.t5:T5Config",
    "Evaluation": "promot_jax.evaluation.settings:Evaluation",
    "Decoding": "promot_jax.decoding.settings:Decoding",
    "PromptInit": "promot_jax.params.soft_prompts:PromptInit",
    "Partitioner": "promot_jax.distributed.partitioning:Partitioner",
    "Training": "promot_jax.training.settings:Training",
    "Tuning": "promot_jax.training.settings:tuning",
    "Lora": "promot_jax.params.lora:Lora",
    "Replay": "promot_jax.data.replay:Replay",
    "Optimizer": "promot_jax.training.optimizer:Optimizer",
}

PREEMPTED = 75  # exit status: EX_TEMPFAIL, "try again later"

USAGE = """\
python -m promot_jax.main --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--workdir=FOLDER]

  --gin_file        a gin file, looked for here and then among those below; may repeat, a later one wins
  --gin.NAME=VALUE  sets a macro (--gin.TRAIN_STEPS=9) or a parameter (--gin.Experiment.seed=1); strings need no quotes
  --workdir         where the run writes and resumes from (default: runs/<name of the gin file>)

Several hosts (found by themselves on TPU VM, GKE, Slurm and Open MPI; --num_hosts=1 runs alone there too):
  --coordinator=HOST:PORT --num_hosts=N --host_id=I   where host 0 is to be reached, how many there are, which this is
  --start_timeout, --heartbeat_timeout, --barrier_timeout   seconds (300, 30, 600) to wait for hosts: to join, for a
                    sign of life, at a common point
  --preemption_notice   "auto" (on Google Cloud), "off", or an address that says TRUE ahead of a preemption

Gin files:
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
    flags.DEFINE_float("start_timeout", 300, "seconds for hosts to join", flag_values=values)
    flags.DEFINE_float("heartbeat_timeout", 30, "seconds without a sign of life", flag_values=values)
    flags.DEFINE_float("barrier_timeout", 600, "seconds at a common point", flag_values=values)
    flags.DEFINE_string("preemption_notice", "auto", "where a preemption is announced", flag_values=values)
    flags.DEFINE_bool("help", False, "show the flags and the gin files", short_name="h", flag_values=values)
    try:
        rest = values(others)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"There is no flag --{error.flagname}{nearest(error.flagname, list(values))}.") from error
    except flags.Error as error:
        raise UserError(f"{error}.") from error
    if rest:
        raise UserError(f"{rest[0]!r} is no flag: settings are given as --gin.NAME=VALUE.")
    return values, overrides


def run(argv: Sequence[str]) -> int:
    """Runs the job that the arguments ask for, and returns 0, or 2 when they ask for none."""
    values, overrides = parse_flags(argv)
    if values.help or not values.gin_file:
        print(USAGE + gin_files.listing(), file=sys.stdout if values.help else sys.stderr)
        return 0 if values.help else 2
    paths = [gin_files.find(name, (Path(), gin_files.folder())) for name in values.gin_file]
    job = binding.bind(CONFIGURABLES, paths, overrides)
    workdir = Path(values.workdir or Path("runs") / "-".join(path.stem for path in paths))
    timeouts: dict[str, Any] = {
        name: values[name].value for name in ("start_timeout", "heartbeat_timeout", "barrier_timeout")
    }
    hosts.join(values.coordinator, values.num_hosts, values.host_id, **timeouts)
    with preemption.heeded(preemption.notice_address(values.preemption_notice)):
        try:
            with _one_voice():
                _run_in(workdir, job)
            status = 0
        except PreemptedError as stop:
            print(f"{stop} The same command resumes the run.", file=sys.stderr, flush=True)
            status = PREEMPTED
        hosts.leave()
    return status


def _run_in(workdir: Path, job: Callable[..., Any]) -> None:
    """Calls the job in its folder."""
    hosts.decide(lambda: _prepare(workdir), "the workdir")
    hosts.check_shared(workdir)
    flags.FLAGS.mark_as_parsed()  # libraries may read the flags they define
    start = time.monotonic()
    job(workdir=workdir)
    if hosts.is_writer():
        binding.write(workdir)
    written = "  ".join(sorted(path.name + "/" * path.is_dir() for path in workdir.iterdir()))
    print(f"Done after {time.monotonic() - start:.0f} s. {workdir}/ holds: {written}", flush=True)


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


def _prepare(workdir: Path) -> None:
    """Makes the workdir, deletes what killed runs left half written, and says in a new one what will run there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.delete_leftovers(workdir)
        if not any(workdir.iterdir()):  # the job may yet refuse to go on in a folder of other settings
            binding.write(workdir)
    except OSError as error:
        raise UserError(f"Cannot write to the workdir {workdir}: {error.strerror}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (default: the command line) and returns the exit status; errors become one sentence on stderr."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UserError, TrainingError) as error:
        message = str(error).partition("\n  In call to configurable")[0]  # gin appends this
        message = " ".join(message.split())
        status = 2 if isinstance(error, UserError) else 1
        hosts.fail(error, message, status)
        print(message, file=sys.stderr, flush=True)
        return status
    except KeyboardInterrupt as error:
        message = "Interrupted. The same command resumes the run."
        hosts.fail(error, message, 130)
        print(message, file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        hosts.fail(error, traceback.format_exc(), 1)
        raise


if __name__ == "__main__":
    sys.exit(main())
