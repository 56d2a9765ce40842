"""What docs/findings holds: a report is made of its cells without a model, and its page has the report's table."""

from pathlib import Path

import pytest

from promot_jax import main
from promot_jax.report import checkpoints
from promot_jax.report.markdown import markdown
from promot_jax.results import records
from promot_jax.results.schema import Comparison

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("study", ["frontier", "frontier_methods"])
def test_a_report_is_made_of_the_cells_alone(tmp_path: Path, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make findings`."""
    monkeypatch.chdir(ROOT)  # ARCHIVE is a folder of the checkout
    command = [f"--gin_file=studies/{study}.gin", "--gin.RUN_CELLS=False", f"--workdir={tmp_path}"]
    assert main.main(command) == 0
    pages = list(tmp_path.rglob("report.html"))
    assert pages and all("<h1" in page.read_text("utf-8") for page in pages)
    if study == "frontier":
        assert {"movie_sentiment", "inflection_choice", "interface_enfr"} <= {path.name for path in tmp_path.iterdir()}
        rows, _ = checkpoints.rows(records.read(tmp_path / "movie_sentiment" / "results.json", Comparison))
        assert markdown(rows) in (ROOT / "docs/findings/README.md").read_text("utf-8")
