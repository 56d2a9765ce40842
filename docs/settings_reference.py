"""Writes the page of all settings from the code: each class that gin configures, its fields, defaults and comments."""

import dataclasses
import importlib
import inspect
import re
from typing import Any

from promot_jax import main

PAGE = "settings.md"
HEADER = """# All settings

Every name that a gin file or `--gin.NAME.FIELD=VALUE` may set, from the code. The macros of
[Commands and macros](config.md) set the most common of them.
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the page to the site, as a hook of mkdocs."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page as Markdown."""
    return HEADER + "".join(_section(name, _resolved(path)) for name, path in main.CONFIGURABLES.items())


def _resolved(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _section(name: str, configurable: Any) -> str:
    comments = _comments(configurable) if dataclasses.is_dataclass(configurable) else _arguments(configurable)
    parameters = inspect.signature(configurable).parameters.values()
    rows = [(one.name, _default(one), comments.get(one.name, "")) for one in parameters if one.name != "workdir"]
    about = (inspect.getdoc(configurable) or "").split("\n\n")[0].replace("\n", " ")
    table = "".join(f"| `{name}.{field}` | {default} | {_cell(comment)} |\n" for field, default, comment in rows)
    return f"\n## {name}\n\n{about}\n\n" + (f"| setting | default | |\n|---|---|---|\n{table}" if rows else "")


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    value = repr(parameter.default)
    return f"`{_cell(value)}`" if len(value) < 60 and " at 0x" not in value else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _comments(cls: type) -> dict[str, str]:
    """The comments beside and above the fields of a dataclass, by field."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        if field := re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line):
            found[field[1]] = " ".join(filter(None, [*above, field[2]]))
            above = []
        elif comment := re.match(r"    #\s*(.*)$", line):
            above.append(comment[1])
        else:
            above = []
    return found


def _arguments(function: Any) -> dict[str, str]:
    """The descriptions of a function's arguments in its docstring, by argument."""
    _, _, section = (inspect.getdoc(function) or "").partition("Args:\n")
    body = section.partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", body, re.M)}
