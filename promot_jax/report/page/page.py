"""`report.html`: a comparison as one page that opens from disk, with no network and under a strict policy.

`templates/page.html` is its outline. Style and script lie beside this file and are written into the page; its
Content-Security-Policy admits those two by their hash and nothing else. All that comes from data is escaped by the
templates (`promot_jax.report.html`).
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from promot_jax.files import write_text
from promot_jax.methods import label
from promot_jax.report import figures, html, tables
from promot_jax.report.page import browser, sections
from promot_jax.report.svg import COLORS, css, legend, plot
from promot_jax.results import records
from promot_jax.results.comparison import as_comparison
from promot_jax.results.schema import Comparison, GradientAlignment, Run

TITLE = "ProMoT report"
COLOUR = "better (green) or worse (red) than pretrained, where both brackets are known and do not overlap."


def write(comparisons: Mapping[str, Run | Comparison], folder: Path, analysed: Sequence[Path] = ()) -> Path:
    """Writes `report.html` into a folder, all or nothing.

    Args:
        comparisons: by fine-tuned task, each a comparison or a single run.
        folder: created if need be; gradient alignments in `analyses/*/results.json` below it are shown too.
        analysed: further folders whose gradient alignments are shown.

    Raises:
        UserError: a gradient alignment is not in its layout.
    """
    return write_text(folder / "report.html", render(comparisons, alignments(folder, *analysed), folder))


def analyses(*folders: Path) -> list[Path]:
    """The results in `analyses/*/` below folders, each once."""
    return [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("analyses/*/results.json"))]


def alignments(*folders: Path) -> list[GradientAlignment]:
    """What the job `gradient_alignment` left there; raises `UserError` for a file that is something else."""
    advice = "it does not hold a gradient alignment: move it away"
    return [records.read(path, GradientAlignment, advice) for path in analyses(*folders)]


def render(
    comparisons: Mapping[str, Run | Comparison], aligned: Sequence[GradientAlignment] = (), folder: Path | None = None
) -> str:
    """The whole page of comparisons (as for `write`) and gradient alignments, the same for the same results.

    With a `folder` its head names it and the day.
    """
    # The colours of both themes as variables; `color-scheme` chooses.
    colors = "".join(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in COLORS.items())
    tasks = {name: as_comparison(comparison) for name, comparison in comparisons.items()}
    return html.render(
        "page.html",
        title=TITLE,
        style=Markup(f":root {{ {colors} }}\n{css()}{_file('style.css')}"),
        script=Markup(_file("script.js")),
        hash=_hash,
        label=label,
        signed=tables.signed,
        plot=plot,
        legend=legend,
        values=sections.values,
        facts=tables.facts(list(tasks.values()), folder),
        tasks=[sections.task(name, each, index, len(tasks) > 1) for index, (name, each) in enumerate(tasks.items())],
        alignments=[chart for each in aligned for chart in figures.gradient_alignment(each)],
        alignment_reading=tables.aligned_reading(aligned) if aligned else "",
        samples=browser.samples(tasks),
        runs=browser.runs(tasks),
        terms=tables.TERMS | {"In colour": COLOUR},
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """Names a text in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
