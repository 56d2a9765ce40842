"""The end of a run on the terminal."""

import shlex
from pathlib import Path

from random_results import random_run

from promot_jax import main
from promot_jax.config import binding, gin_files
from promot_jax.report import terminal


def commands(text: str) -> list[list[str]]:
    """The arguments of the commands in a text, as a shell splits them."""
    return [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("  python -m promot_jax.main ")]


def test_a_run_ends_with_its_report_and_the_next_commands(tmp_path: Path) -> None:
    """The command line itself says whether the commands are right: it builds their jobs."""
    folder = tmp_path / "my runs" / "promot"
    (folder / "stage1" / "prompt").mkdir(parents=True)
    (folder / "stage1" / "prompt" / "prompt.npy").touch()
    text = terminal.next_steps(folder / "report.md", random_run("promot", 0), folder)
    assert text.startswith(f"Report: {folder}/report.html and report.md\nNext:\n")
    infer, export = commands(text)
    for argv, job in ((infer, "infer"), (export, "export")):
        values, overrides = main.parse_flags(argv)
        assert values.gin_file == [f"{job}.gin"]
        built = binding.bind(main.CONFIGURABLES, [gin_files.folder() / f"{job}.gin"], overrides).keywords
        assert built["experiment"].checkpoint == str(folder)
        assert built["experiment"].prompt_path == str(folder / "stage1")


def test_next_commands_of_a_run_that_tuned_no_model_name_its_base(tmp_path: Path) -> None:
    (infer, _) = commands(terminal.next_steps(tmp_path / "report.md", random_run("pretrained", 0), tmp_path))
    assert "--gin.INITIAL_CHECKPOINT_PATH=random_weights" in infer and "PROMPT_PATH" not in " ".join(infer)
