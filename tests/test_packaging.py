"""The package as users get it: light to import, and complete when installed from a wheel."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(*arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with `path` in front of what is installed, from a folder that is not the checkout."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_import_is_light(tmp_path: Path) -> None:
    code = "import promot_jax, sys; print(promot_jax.__version__, {'tensorflow', 'jax', 'gin'} & set(sys.modules))"
    done = python("-c", code, path=ROOT, cwd=tmp_path)
    assert done.stdout.endswith(" set()\n"), done


def test_gin_library_wins_over_the_folder() -> None:
    assert not (ROOT / "gin" / "__init__.py").exists()
    done = python("-c", "import gin; print(gin.__file__)", path=ROOT, cwd=ROOT)
    assert "gin/__init__.py" in done.stdout and str(ROOT / "gin") not in done.stdout


def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    elsewhere.mkdir()
    source.mkdir()
    for name in ("promot_jax", "tasks", "gin"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (source / "gin" / "nested").mkdir()
    (source / "gin" / "nested" / "probe.gin").write_text("# A file in a folder.\n")

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run([*pip, *build], cwd=source, check=True)
    (wheel,) = (source / "dist").glob("promot_jax-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)

    for name, installed in (("promot_jax", "promot_jax"), ("tasks", "promot_jax/tasks"), ("gin", "promot_jax/gin")):
        files = {path.relative_to(source / name) for path in (source / name).rglob("*") if path.is_file()}
        assert {path for path in files if not (target / installed / path).is_file()} == set()
    assert not (target / "gin").exists() and not (target / "tasks").exists() and not (target / "tests").exists()

    usage = python("-m", "promot_jax.main", path=target, cwd=elsewhere)
    assert usage.returncode == 2 and re.search(r"nested/probe\.gin +A file in a folder\.", usage.stderr)
    assert all(path.name in usage.stderr for path in (ROOT / "gin").glob("*.gin"))
    missing = python("-m", "promot_jax.main", "--gin_file=nested/prob.gin", path=target, cwd=elsewhere)
    assert missing.returncode == 2 and "did you mean 'nested/probe.gin'?" in missing.stderr
    script = python(str(target / "bin" / "promot_jax"), "--gin_file=nested/prob.gin", path=target, cwd=elsewhere)
    assert (script.returncode, script.stderr) == (2, missing.stderr)
    tasks = python("-c", "import promot_jax.tasks as t; print(t.__file__)", path=target, cwd=elsewhere)
    assert tasks.stdout.strip() == str(target / "promot_jax" / "tasks" / "__init__.py"), tasks.stderr
