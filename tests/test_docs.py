"""The command blocks of README and docs name commands, files and settings that exist; the page of all settings."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from promot_jax import main
from promot_jax.config import binding, gin_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = (("python", "-m", "promot_jax.main"), (".venv/bin/python", "-m", "promot_jax.main"), ("promot_jax",))
# Commands that no test runs, and why.
NOT_RUN = {
    "pip": "needs a network",
    "gcloud": "needs an account",
    "gsutil": "needs an account",
    "kubectl": "needs a cluster",
    "xpk": "needs an account",
    "sbatch": "needs a cluster",
    "srun": "needs a cluster",
    "mpirun": "needs a cluster",
    "docker": "needs a daemon",
    "git": "needs a network",
    "lm_eval": "tests/test_lm_eval.py runs it",
    "source": "sets up the shell",
    "cd": "sets up the shell",
    "export": "sets up the shell",
    "tensorboard": "opens a server",
    "tfds": "needs a network",
    "python": "a script that another test runs, or one of a library",
    ".venv/bin/python": "a script that another test runs, or one of a library",
    ".venv/bin/pre-commit": "needs a network",
    "pre-commit": "needs a network",
}


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every command of a bash block, as `(page, words)`, without assignments in front and what a pipe adds."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            variables: dict[str, list[str]] = {}
            for words in _split(block.replace("\\\n", " ")):
                words = [word for part in words for word in variables.get(part, [part])]
                while words and (assigned := re.fullmatch(r"([A-Za-z_]+)=(.*)", words[0], re.S)):
                    variables[f"${assigned[1]}"] = shlex.split(assigned[2])
                    words = words[1:]
                if words:
                    found.append((page.name, tuple(words)))
    return found


def _split(block: str) -> Iterator[list[str]]:
    """The words of each command; a quoted text may go on over lines."""
    text = ""
    for line in block.splitlines():
        text += f"{line}\n"
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quotation goes on
            continue
        yield words
        text = ""
    assert not text, text


def of_ours() -> list[tuple[str, list[str]]]:
    """Arguments of every command that runs this package."""
    starts = [(page, words, next((len(o) for o in OURS if words[: len(o)] == o), 0)) for page, words in commands()]
    return [(page, list(words[start:])) for page, words, start in starts if start]


@pytest.mark.parametrize(("page", "words"), of_ours(), ids=str)
def test_a_command_is_bound(page: str, words: list[str]) -> None:
    """Its gin files are found, and every setting is known and of its type; files of the reader's own are left out."""
    if "[" in "".join(words):  # the synopsis
        return
    values, overrides = main.parse_flags(words)
    names = [name for name in values.gin_file if not Path(name).stem.startswith("my")]
    if values.help:
        return
    paths = [gin_files.find(name, (Path(), gin_files.folder())) for name in names]
    binding.bind(main.CONFIGURABLES, paths, overrides)


def test_other_commands_exist_or_are_not_run_for_a_reason() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for page, words in commands():
        if any(words[: len(start)] == start for start in OURS) or words[0] in NOT_RUN:
            continue
        if words[0] == "make":
            wanted = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(wanted) <= set(targets), (page, words)
        else:
            assert (ROOT / words[0]).is_file(), (page, words)


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_the_method_are_what_their_script_draws() -> None:
    """Each has a title and a description, and lies on the page with an alternative text."""
    page = (ROOT / "docs" / "method.md").read_text("utf-8")
    pictures = script("pictures").PICTURES
    for name, draw in pictures.items():
        picture = (ROOT / "docs" / "figures" / f"{name}.svg").read_text("utf-8")
        assert picture == draw(), "run python docs/pictures.py"
        texts = {node.tag.rpartition("}")[2]: node.text for node in ElementTree.fromstring(picture)}
        assert texts["title"] and texts["desc"]
        assert re.search(rf"!\[[^\]]+\]\(figures/{name}\.svg\)", page)
    assert set(re.findall(r"figures/(method_\w+)\.svg", page)) == set(pictures)


def test_every_setting_has_a_row_and_says_what_it_is() -> None:
    page = script("settings_reference").page()

    assert re.findall(r"^## (\w+)$", page, re.M) == [*main.CONFIGURABLES]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", page, re.M))
    assert rows["Training.batch_size"] == "required | rows of one update, over all devices"
    assert "longest output" in rows["Decoding.max_tokens"] or "tokens" in rows["Decoding.max_tokens"]
    classes = ("Evaluation.", "Decoding.", "Training.", "Partitioner.", "DecoderConfig.")
    assert not [name for name, cells in rows.items() if cells.endswith("| ") and name.startswith(classes)]
