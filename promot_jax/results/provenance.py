"""Which code made a result: commit and package versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("promot_jax", "jax", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers depend on, without importing any of it; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The git commit of the checkout this package lies in, with `-dirty` where tracked files are modified.

    None where there is no git, no commit, or the package is not itself under version control (say, installed into a
    virtual environment that lies in somebody else's repository). Never fails.
    """
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        head = _git(here.parent, "rev-parse", "--verify", "HEAD")
        modified = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return f"{head}-dirty" if modified else head


def _git(folder: Path, *arguments: str) -> str:
    # Inside a git hook these variables point at another repository; optional locks would disturb a user's own git.
    env = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    env["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, env=env, capture_output=True, check=True, text=True, timeout=30).stdout.strip()
