"""The gin files: where they are, and the statements they hold.

gin's parser reads them into its `BindingStatement(scope, selector, arg_name, value, location)`; a macro has an empty
`arg_name`. Here is what gin does not do: it looks for an included file in fixed folders and not beside the file that
includes it, forgets where a value was set, and takes no string without quotes.
"""

import contextlib
import io
import itertools
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gin import config as gin_config
from gin import config_parser

import promot_jax
from promot_jax.errors import UserError, nearest

Statement = Any  # config_parser.BindingStatement; its `location` is a text: file and line, or the flag


def folder() -> Path:
    """Returns the folder of the gin files of the package: `promot_jax/gin` when installed, `gin` in a checkout."""
    package = Path(promot_jax.__file__).parent
    return package / "gin" if (package / "gin").is_dir() else package.parent / "gin"


def of_package() -> dict[str, Path]:
    """Returns the gin files of the package by the name that `--gin_file` takes."""
    return {path.relative_to(folder()).as_posix(): path for path in sorted(folder().rglob("*.gin"))}


def listing() -> str:
    """Returns the gin files of the package: runs with what they do, need and give, then the parts that go with them."""
    runs = {name: path for name, path in of_package().items() if ("", "run", "job") in settings([path])}
    parts = {name: _header(path)[0] for name, path in of_package().items() if name not in runs}
    width = max(map(len, parts), default=0)
    lines = [f"  {name:{width}}  {about}\n" for name, about in parts.items()]
    described = [f"  {name}\n" + "".join(f"      {line}\n" for line in _about(path)) for name, path in runs.items()]
    return f"Runs:\n{''.join(described)}\nParts, to be given after a run's file:\n{''.join(lines)}"


def _header(path: Path) -> list[str]:
    comments = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    return [line.removeprefix("#").removeprefix(" ") for line in comments] or [""]


def _about(path: Path) -> list[str]:
    """The header of a run's gin file without its command, and without tables of scores."""
    lines = _header(path)
    needs = itertools.dropwhile(lambda line: not line.startswith("Hardware:"), lines)
    about = itertools.takewhile(lambda line: not line.startswith(("Command:", "Hardware:")), lines)
    return [*about, *itertools.takewhile(lambda line: "   " not in line, needs)]


def macros_of_run(paths: Iterable[Path], overrides: Iterable[tuple[str, str]]) -> str:
    """Returns a line for each macro of a run: its name, value, and the comment beside it."""
    lines = []
    for (scope, name, argument), setting in settings(paths, overrides).items():
        if not argument:
            place, _, number = setting.location.rpartition(" line ")
            line = find(place, (folder(), Path())).read_text("utf-8").splitlines()[int(number) - 1] if place else ""
            comment = next((f"  {token.string}" for token in _tokens(line) if token.type == tokenize.COMMENT), "")
            lines.append(f"  {f'{scope}/' * bool(scope)}{name} = {setting.value!r}{comment}\n")
    return "".join(lines)


def _tokens(line: str) -> Iterator[tokenize.TokenInfo]:
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # the first line of a longer value
        yield from tokenize.generate_tokens(io.StringIO(line).readline)


def macros_of_package() -> set[str]:
    """Returns the names of all macros that some gin file of the package uses."""
    return {name for path in of_package().values() for name in re.findall(r"%([\w/]+)", path.read_text("utf-8"))}


def find(name: str, folders: Iterable[Path]) -> Path:
    """Returns the first file called `name`, or `name.gin`, in `folders`; a `UserError` names the package's nearest."""
    for path in (place / f"{name}{suffix}" for place in folders for suffix in ("", ".gin") if name):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if path.is_file():
                return path
    if name.startswith("methods/"):
        method = name.removeprefix("methods/").removesuffix(".gin")
        given = "NAME_1shot (promot_1shot)" if method == "one_shot" else method
        raise UserError(f"There is no gin file {name!r} any more: give --gin_file=method.gin --gin.METHOD={given}.")
    raise UserError(f"There is no gin file {name!r} here or in {folder()}{nearest(name, of_package())}.")


def read(path: Path, parents: tuple[Path, ...] = ()) -> Iterator[Statement]:
    """Yields the bindings of a gin file and of those it includes, in order; a `UserError` names a bad line."""
    if path in parents:
        raise UserError(f"{path} includes itself.")
    name = str(path.relative_to(folder()) if path.is_relative_to(folder()) else path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read as a gin file: {error}.") from error
    for statement in parse(text, name):
        if isinstance(statement, config_parser.IncludeStatement):
            yield from read(find(statement.filename, (path.parent, folder(), Path())), (*parents, path))
        elif isinstance(statement, config_parser.ImportStatement):
            place = statement.location
            raise UserError(f"{place}: nothing is imported here; name modules with tasks in MIXTURE_OR_TASK_MODULE.")
        elif isinstance(statement, config_parser.BindingStatement):
            yield statement


def read_override(name: str, text: str) -> Statement:
    """Returns the statement of `--gin.NAME=TEXT`; a text that is no gin value is a string without its quotes."""
    flag = f"--gin.{name}"
    try:
        statements = list(parse(f"{name} = {text}", flag))
    except UserError:
        # These can only be meant as gin, where a mistake is an error; but "{text} Good or bad?" is a template.
        if text.startswith(tuple("([{'\"@%")) and not re.match(r"{[^\W\d][\w ]*}", text):
            raise
        statements = []
    if len(statements) != 1:
        statements = list(parse(f"{name} = {text!r}", flag))
    return statements[0]._replace(location=flag)


def is_override(statement: Statement) -> bool:
    """Returns whether a statement comes from the command line."""
    return bool(statement.location.startswith("--gin."))


def settings(paths: Iterable[Path], overrides: Iterable[tuple[str, str]] = ()) -> dict[tuple[str, str, str], Statement]:
    """Returns the statements of files, then overrides, by scope, selector and argument: the last one of each counts."""
    statements = [statement for path in paths for statement in read(path)]
    statements += [read_override(*override) for override in overrides]
    return {statement[:3]: statement for statement in statements}


def parse(text: str, name: str) -> Iterator[Statement]:
    """Yields gin's statements, with `name` and the line as their location; a `UserError` names a bad line."""
    try:
        for statement in config_parser.ConfigParser(text, gin_config.ParserDelegate(skip_unknown=True)):
            yield statement._replace(location=f"{name} line {statement.location.line_num}")
    except (SyntaxError, tokenize.TokenError) as error:
        message, line = (
            (error.msg, error.lineno) if isinstance(error, SyntaxError) else (error.args[0], error.args[1][0])
        )
        message = re.sub(r".*Failed to parse token (.*)", r"cannot read \1, a string needs quotes", message, flags=re.S)
        raise UserError(f"{name} line {line}: {message.strip().rstrip('.')}.") from error
    except (TypeError, ValueError, RecursionError, MemoryError) as error:  # keys that are lists, brackets without end
        raise UserError(f"{name}: a value cannot be read ({error or type(error).__name__}).") from error
