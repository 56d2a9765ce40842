"""Runs the code of an exported folder's README.md, as a reader would who stands in that folder."""

import contextlib
import io
import re
from pathlib import Path

import pytest


def printed(folder: Path) -> str:
    """What the code of README.md prints: the generated text."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        exec(compile(code, str(folder / "README.md"), "exec"), {})
    return out.getvalue().removesuffix("\n")
