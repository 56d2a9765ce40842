"""`report.html`: a comparison as one page that opens from disk, with no network and under a strict policy.

Style and script lie beside this file and are written into the page; its Content-Security-Policy admits those two by
their hash and nothing else. All that comes from data goes through `promot_jax.report.html`, which escapes it.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from promot_jax.errors import UserError
from promot_jax.files import write_text
from promot_jax.report import tables
from promot_jax.report.html import Markup, join, tag
from promot_jax.report.page import browser, sections
from promot_jax.report.svg import COLORS, CSS
from promot_jax.results.comparison import as_comparison

Json = dict[str, Any]


def write(
    comparisons: Mapping[str, Json],
    folder: str | os.PathLike[str],
    *,
    title: str = "ProMoT report",
    analysed: Sequence[Path] = (),
) -> Path:
    """Writes `report.html` into a folder, all or nothing.

    Args:
        comparisons: by fine-tuned task, each a comparison (or a single run) as in `promot_jax.results.schema`.
        folder: created if need be; gradient alignments in `analyses/*/results.json` below it are shown too.
        title: of the page.
        analysed: further folders whose gradient alignments are shown.

    Returns:
        Path of `report.html`.

    Raises:
        UserError: results that are not in their layout.
    """
    folder = Path(folder)
    return write_text(folder / "report.html", render(comparisons, alignments(folder, *analysed), title=title))


def analyses(*folders: Path) -> list[Path]:
    """The results in `analyses/*/` below folders, each once."""
    return [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("analyses/*/results.json"))]


def alignments(*folders: Path) -> list[Json]:
    """What the job `gradient_alignment` left in `analyses/*/` below a comparison's folder, or several."""
    found = []
    for path in analyses(*folders):
        try:
            found.append(json.loads(path.read_text("utf-8")))
            if found[-1]["job"] != "gradient_alignment":
                raise ValueError("of another job")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not hold a gradient alignment ({error}); move it away.") from error
    return found


def render(comparisons: Mapping[str, Json], aligned: Sequence[Json] = (), *, title: str = "ProMoT report") -> str:
    """The whole page, the same for the same results.

    Args:
        comparisons: as for `write`.
        aligned: gradient alignments.
        title: of the page.
    """
    tasks = {name: as_comparison(one) for name, one in comparisons.items()}
    style, script = _palette() + CSS + _file("style.css"), _file("script.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
    policy += "base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(style)),
    )
    shown = [sections.task(name, one, index, len(tasks) > 1) for index, (name, one) in enumerate(tasks.items())]
    parts = [*shown, sections.alignments(aligned), browser.samples(tasks), browser.runs(tasks)]
    main = tag("main", *parts, id="main")
    body = tag(
        "body",
        tag("a", "Skip to content", href="#main", class_="skip"),
        sections.header(title, tasks, bool(aligned)),
        main,
        tag("footer", tag("p", tables.READING, " ", sections.MORE_READING), tag("p", tables.MATCHED)),
        tag("div", id="tip", role="status", hidden=True),
        tag("script", Markup(script)),
    )
    return join(Markup("<!DOCTYPE html>\n"), tag("html", head, Markup("\n"), body, lang="en"), Markup("\n"))


def _palette() -> str:
    """The colours of both themes as variables; `color-scheme` chooses."""
    values = "".join(f"--{name}: light-dark({light}, {dark});" for name, (light, dark) in COLORS.items())
    return f":root {{ {values} }}\n"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
