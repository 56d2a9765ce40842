"""docs/demo.ipynb runs from its first cell to its last on the real model and data, at a small budget."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from compilation import AS_USERS

NOTEBOOK = Path(__file__).parents[1] / "docs" / "demo.ipynb"
BUDGET = "PROMPT_STEPS, MODEL_STEPS, EXAMPLES, ICL_EXAMPLES = {}"


def run(folder: Path, budget: tuple[int, int, int, int]) -> Any:
    """Executes the notebook in a folder with other values in its cell of parameters.

    Returns it with its outputs, which `executed.ipynb` there has too, also those before a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = BUDGET.format(budget)
    try:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")
    return notebook


def printed(cell: Any) -> str:
    """What a cell printed on standard output."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_the_notebook_has_no_outputs_and_one_cell_of_parameters() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) == 1
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.real
# Jupyter's client and kernel talk over local sockets, and say that these are not encrypted.
@pytest.mark.filterwarnings("ignore:Kernel is running over TCP without encryption")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of each kind, generation with and without the prompt, scores of three models, and the export."""
    path = os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")])
    for name, value in {"PYTHONPATH": path, "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"), **AS_USERS}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    cells = {cell.source: printed(cell) for cell in run(tmp_path / "run", (2, 1, 4, 1)).cells if "outputs" in cell}
    calls = ("show(", "scores(", "export(")  # of several cells with a call the last one
    outputs = {call: text for source, text in cells.items() for call in calls if call in source}
    assert [line.split()[0] for line in outputs["scores("].splitlines()[-3:]] == ["pretrained", "finetuned", "promot"]
    assert "promot_stripped" in outputs["show("] and "Country: Peru Capital:" in outputs["show("]
    assert [line.split()[0] for line in outputs["export("].splitlines()] == [
        f"exported/{name}" for name in ("stripped", "with_prompts", "peft/reviews")
    ]
