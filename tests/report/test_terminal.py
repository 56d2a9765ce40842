"""The end of a run on the terminal."""

import shlex
from pathlib import Path

import pytest
from random_results import TASKS, random_run

from promot_jax import main
from promot_jax.config import binding, gin_files
from promot_jax.report import tables, terminal
from promot_jax.results.comparison import as_comparison
from promot_jax.results.records import replace
from promot_jax.results.scores import Icl


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
    infer, chat, export = commands(text)
    values, overrides = main.parse_flags(chat)
    models = binding.bind(main.CONFIGURABLES, [gin_files.folder() / values.gin_file[0]], overrides).keywords["models"]
    assert models == {"pretrained": "random_weights", "ProMoT": str(folder)}
    for argv, job in ((infer, "infer"), (export, "export")):
        values, overrides = main.parse_flags(argv)
        assert values.gin_file == [f"{job}.gin"]
        built = binding.bind(main.CONFIGURABLES, [gin_files.folder() / f"{job}.gin"], overrides).keywords
        assert built["experiment"].checkpoint == str(folder)
        assert built["experiment"].prompt_path == str(folder / "stage1")


def test_next_commands_of_a_run_that_tuned_no_model_name_its_base(tmp_path: Path) -> None:
    (infer, _) = commands(terminal.next_steps(tmp_path / "report.md", random_run("pretrained", 0), tmp_path))
    assert "--gin.INITIAL_CHECKPOINT_PATH=random_weights" in infer and "PROMPT_PATH" not in " ".join(infer)


def test_accuracies_by_likelihood_have_rows_where_they_were_measured() -> None:
    run = random_run("finetune", 0)
    assert "acc norm" not in terminal.table(run)
    tasks = run.icl["1"].tasks | {"negation": replace(run.icl["1"].tasks["negation"], acc=62.5, acc_norm=50.0)}
    icl = Icl.of(tasks)
    scored = replace(run, icl={**run.icl, "1": icl}, target=replace(run.target, acc=75.0, acc_norm=25.0))
    assert (icl.acc, icl.acc_norm) == (62.5, 50.0) and len(tasks) == len(TASKS)
    table = tables.scores(as_comparison(scored))
    cells = {row.label: {shots: cell.value for (_, shots), cell in row.cells.items()} for row in table.rows[-4:]}
    assert cells == {
        "sentiment, target (acc)": {None: 75.0},
        "sentiment, target (acc norm)": {None: 25.0},
        "negation (acc)": {"1": pytest.approx(62.5)},
        "negation (acc norm)": {"1": 50.0},
    }
    assert tables.LIKELIHOOD in table.notes and "negation (acc norm)" in terminal.table(scored)
