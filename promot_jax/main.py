"""Runs one job: reads the flags and the gin files, builds what they describe, calls it.

    python -m promot_jax.main --gin_file=promot_stage1.gin --gin.TRAIN_STEPS=200 --workdir=runs/first

This is the only module that imports gin, and gin's part is over before the job starts: every `@Stage()` has been built
by then, and the job is a plain function called with plain arguments. The library knows nothing of gin: the names a gin
file may use stand in `CONFIGURABLES`, and only the modules of the names in use are imported. Names are checked before
that, so that a typo costs no waiting: one sentence on stderr, exit status 2. A run that fails ends with status 1, an
interrupted one with 130. On SIGTERM, or the cloud's notice that it takes the machine away, a run saves its state at the
next step and ends with status 75: start the same command again, and it goes on from there.

On several hosts the same command runs on each. They are found from TPU VM, GKE, Slurm and Open MPI, or given by flags.
Host 0 prints and writes the reports; checkpoints are written by all, so `--workdir` lies on storage that all share.
When a host is gone, the others name it and end with status 1 within `--heartbeat_timeout` and a few seconds.
"""

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import time
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
from absl import flags
from gin import config as gin_config
from gin import config_parser

import promot_jax
from promot_jax import settings as checks
from promot_jax.distributed import hosts, preemption
from promot_jax.errors import PreemptedError, TrainingError, UserError, nearest
from promot_jax.settings import Macro, Reference, Setting, Settings

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
    "Tuning": "promot_jax.training.tuning:Tuning",
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
"""


def gin_folder() -> Path:
    """Returns the folder of the gin files of the package: `promot_jax/gin` when installed, `gin` in a checkout."""
    package = Path(promot_jax.__file__).parent
    return package / "gin" if (package / "gin").is_dir() else package.parent / "gin"


def gin_files() -> dict[str, Path]:
    """Returns the gin files of the package by the name that `--gin_file` takes."""
    return {path.relative_to(gin_folder()).as_posix(): path for path in sorted(gin_folder().rglob("*.gin"))}


def usage() -> str:
    """Returns the flags, and the gin files with the first line of their headers."""
    lines = {name: path.read_text("utf-8").partition("\n")[0].lstrip("# ") for name, path in gin_files().items()}
    width = max(map(len, lines), default=0)
    return USAGE + "\nGin files:\n" + "".join(f"  {name:{width}}  {line}\n" for name, line in lines.items())


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Unresolved(config_parser.ParserDelegate):
    """Lets gin's parser read a file before any name in it is registered."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name.split(".")[-1], evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def find_gin_file(name: str, folders: Iterable[Path]) -> Path:
    """Returns the first file called `name` in `folders`; a `UserError` names the nearest one of the package."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"There is no gin file {name!r} here or in {gin_folder()}{nearest(name, gin_files())}.")


def read(path: Path, parents: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """Yields the settings of a gin file and of those it includes, in order; a `UserError` names a bad line."""
    if path in parents:
        raise UserError(f"{path} includes itself.")
    name = str(path.relative_to(gin_folder()) if path.is_relative_to(gin_folder()) else path)
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read as a gin file: {error}.") from error
    for statement in _parse(content, name):
        place = f"{name} line {statement.location.line_num}"
        if isinstance(statement, config_parser.IncludeStatement):
            found = find_gin_file(statement.filename, (path.parent, gin_folder(), Path()))
            yield from read(found, (*parents, path))
        elif isinstance(statement, config_parser.ImportStatement):
            raise UserError(f"{place}: nothing is imported here; name modules with tasks in MIXTURE_OR_TASK_MODULE.")
        elif isinstance(statement, config_parser.BindingStatement):
            yield _setting(statement, place, is_override=False)


def read_override(name: str, value: str) -> Setting:
    """Reads `--gin.NAME=VALUE`; what is no gin value is a string, which then needs no second pair of quotes."""
    if not value.startswith(tuple("([{'\"@%")):  # these can only be meant as gin: a mistake in them is an error
        try:
            parser = config_parser.ConfigParser(value, _Unresolved())
            parser.parse_value()
            whole = parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        except (SyntaxError, tokenize.TokenError):
            whole = False
        value = value if whole else repr(value)
    return _setting(next(_parse(f"{name} = {value}", f"--gin.{name}")), f"--gin.{name}", is_override=True)


def _parse(text: str, name: str) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(text, _Unresolved())
    except (SyntaxError, tokenize.TokenError) as error:
        if isinstance(error, SyntaxError):
            message, line = error.msg, error.lineno
        else:
            message, line = error.args[0], error.args[1][0]
        message = re.sub(r".*Failed to parse token (.*)", r"cannot read \1, a string needs quotes", message, flags=re.S)
        raise UserError(f"{name} line {line}: {message.strip().rstrip('.')}.") from error


def _setting(statement: config_parser.BindingStatement, place: str, is_override: bool) -> Setting:
    scope, name, parameter, value, _ = statement
    if parameter:
        name = name.split(".")[-1]
    elif scope:  # a macro with a scope: the scope is part of its name
        scope, name = "", f"{scope}/{name}"
    return Setting(scope, name, parameter, value, place, is_override)


# ---- binding ---------------------------------------------------------------------------------------------------------


def bind(settings: Settings) -> Callable[..., Any]:
    """Builds everything that `settings` describe.

    Returns:
        The job, to be called with `workdir`.

    Raises:
        UserError: the settings do not fit the code.
    """
    checks.check_names(settings, [*CONFIGURABLES, "run"], _macros_of_package)
    job = settings["", "run", "job"].value if ("", "run", "job") in settings else None
    if not isinstance(job, Reference) or job.evaluate:
        raise UserError("No job is chosen: a gin file has to set run.job to a reference such as @train.")
    gin.clear_config()
    calls: set[tuple[str, str]] = set()
    names = {setting.name for setting in settings.values() if setting.parameter}
    names |= {reference.name for reference in checks.references(settings.values())}
    targets = {name: _register(name, name == job.name, calls) for name in sorted(names)}
    for setting in settings.values():
        if setting.key[1:] == (job.name, "workdir"):
            raise UserError(f"{setting.place}: the workdir of a job is set with --workdir.")
        if setting.parameter:
            checks.check_parameter(setting, targets[setting.name])
        key = setting.key if setting.parameter else (setting.name, "gin.macro", "value")
        gin.bind_parameter(key, _resolve(setting.value))
    gin.finalize()
    ready: Callable[..., Any] = gin.get_configurable("run")()()
    checks.check_overrides(settings, calls)
    return ready


def _macros_of_package() -> set[str]:
    return {name for path in gin_files().values() for name in re.findall(r"%([\w/]+)", path.read_text("utf-8"))}


def _register(name: str, is_job: bool, calls: set[tuple[str, str]]) -> Callable[..., Any]:
    """Makes `name` known to gin and returns its target; calls are noted as (scope, name), and a job only gets ready."""
    if name == "run":
        target: Callable[..., Any] = _run
    else:
        module, attribute = CONFIGURABLES[name].split(":")
        target = getattr(importlib.import_module(module), attribute)
    supplied_later = ["workdir"] if is_job else []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.add((gin.current_scope_str(), name))
        given = inspect.signature(target).bind_partial(*args, **kwargs)
        given.arguments |= checks.check_arguments(
            checks.scoped(gin.current_scope_str(), name), target, given.arguments, supplied_later
        )
        return functools.partial(target, *given.args, **given.kwargs) if is_job else target(*given.args, **given.kwargs)

    # gin looks for parameters and defaults here, and the operative configuration lists them.
    call.__name__, call.__doc__, call.__signature__ = name, target.__doc__, inspect.signature(target)  # type: ignore
    with gin_config.interactive_mode():  # so that main may be called again in the same process
        gin.external_configurable(call, name=name, module="promot_jax", denylist=supplied_later)
    return target


def _run(job: Callable[..., Any]) -> Callable[..., Any]:
    """What `run` means in a gin file: `run.job = @train` chooses the job."""
    return job


def _resolve(value: Any) -> Any:
    """Returns a value with gin's own references in the place of ours."""
    delegate = gin_config.ParserDelegate()
    if isinstance(value, Reference):
        return delegate.configurable_reference(checks.scoped(value.scope, value.name), value.evaluate)
    if isinstance(value, Macro):
        return delegate.macro(value.name)
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    return type(value)(map(_resolve, value)) if isinstance(value, list | tuple) else value


# ---- running ---------------------------------------------------------------------------------------------------------


def parse_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[Setting]]:
    """Returns the flags and the `--gin.NAME=VALUE` overrides; a `UserError` names an unknown flag."""
    overrides, others = [], ["main"]
    for argument in argv:
        match = re.fullmatch(r"--?gin\.([\w./]+)=(.*)", argument, flags=re.S)
        if match:
            overrides.append(read_override(match[1], match[2]))
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
        print(usage(), file=sys.stdout if values.help else sys.stderr)
        return 0 if values.help else 2
    paths = [find_gin_file(name, (Path(), gin_folder())) for name in values.gin_file]
    settings = {setting.key: setting for setting in [*(s for path in paths for s in read(path)), *overrides]}
    job = bind(settings)
    workdir = Path(values.workdir or Path("runs") / "-".join(path.stem for path in paths))
    _join(values)
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
        _write_config(workdir)
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


def _join(values: flags.FlagValues) -> None:
    """Joins the other hosts, if there are any."""
    hosts.join(
        values.coordinator,
        values.num_hosts,
        values.host_id,
        start_timeout=values.start_timeout,
        heartbeat_timeout=values.heartbeat_timeout,
        barrier_timeout=values.barrier_timeout,
    )


def _prepare(workdir: Path) -> None:
    """Makes the workdir, and says in a new one what will run there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not any(workdir.iterdir()):  # the job may yet refuse to go on in a folder of other settings
            _write_config(workdir)
    except OSError as error:
        raise UserError(f"Cannot write to the workdir {workdir}: {error.strerror}.") from error


def _write_config(workdir: Path) -> None:
    (workdir / "config.gin").write_text(gin.config_str(120), "utf-8")
    (workdir / "operative_config.gin").write_text(gin.operative_config_str(120), "utf-8")


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
