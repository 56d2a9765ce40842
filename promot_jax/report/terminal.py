"""The report as plain text for a terminal."""

import json
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from promot_jax import methods
from promot_jax.distributed import hosts
from promot_jax.methods import label
from promot_jax.report import blocks, tables
from promot_jax.results.comparison import as_comparison, comparison
from promot_jax.results.schema import Comparison, Run


def table(results: Run | Comparison, *, width: int = 120) -> str:
    """The paper's table for a terminal, and under it paired differences, matched target score, settings and spreads.

    Methods that do not fit into `width` characters side by side follow below.
    """
    results = as_comparison(results)
    main = tables.scores(results)
    parts = [
        text_table(main, width=width),
        "\n".join([*main.notes, *_wrapped((f"{term}: {text}" for term, text in tables.TERMS.items()), width)]),
    ]
    for title, rows, reading in [*blocks.leading(results), *blocks.further(results)]:
        parts += [title, aligned(rows), "\n".join(textwrap.wrap(reading, width))]
    return "\n\n".join(parts) + "\n"


def _wrapped(paragraphs: Iterable[str], width: int) -> list[str]:
    return [line for text in paragraphs for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def text_table(scores: tables.Table, *, width: int = 120) -> str:
    """Scores for a terminal: under each line of scores one of intervals; methods that do not fit follow below."""
    blocks: list[str] = []
    methods: list[str] = []
    for method in scores.methods:
        wider = _text_block(scores, [*methods, method])
        fits = max(map(len, wider.splitlines())) <= width
        if methods and fits:
            blocks[-1] = wider
            methods.append(method)
        else:
            blocks.append(_text_block(scores, [method]))
            methods = [method]
    return "\n\n".join(blocks)


def _text_block(scores: tables.Table, methods: Sequence[str]) -> str:
    columns = scores.columns(methods)
    repeated = [""] * (len(columns) // len(methods) - 1)
    rows = [["", *(cell for method in methods for cell in (label(method), *repeated))]]
    rows += [["", *(f"{shots}-shot" if shots else "" for _, shots in columns)]]
    for row in scores.rows:
        parts = [scores.parts(row, column) for column in columns]
        rows += [[row.label, *(main for main, _ in parts)], ["", *(interval for _, interval in parts)]]
    return aligned(rows, header=2)


def aligned(rows: Sequence[Sequence[str]], *, header: int = 1) -> str:
    """Plain text columns, a rule under the header; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    kept = [line for line in lines[header:] if line]
    return "\n".join([*lines[:header], "-" * max(map(len, lines)), *kept])


def print_table(finished: Sequence[Run]) -> None:
    """Prints the paper's table of finished runs."""
    print("\n" + table(comparison(finished)), flush=True)


def write_and_print(workdir: Path, finished: Sequence[Run]) -> None:
    """Prints the table of finished runs and writes their report into `workdir`; on the host that writes."""
    from promot_jax.report import markdown

    if not hosts.is_writer():
        return
    print_table(finished)
    print("\n" + next_steps(markdown.write(comparison(finished), workdir), finished[-1], workdir), flush=True)


def next_steps(report: Path, run: Run, folder: Path) -> str:
    """Where the report is, and the commands that use what a run in `folder` trained."""
    tuned = [stage for stage in methods.model_tuning() if stage in run.steps]
    model = str(folder) if tuned else run.model or ""
    prompts = [folder / stage for stage in run.steps if (folder / stage / "prompt" / "prompt.npy").is_file()]
    settings = {"INITIAL_CHECKPOINT_PATH": model, "PROMPT_PATH": str(prompts[0]) if prompts else ""}
    flags = " ".join(f"--gin.{name}={shlex.quote(value)}" for name, value in settings.items() if value)
    command = "python -m promot_jax.main --gin_file="
    commands = [f"infer.gin {flags} --gin.INPUTS=questions.txt", f"export.gin {flags}"]
    if tuned:
        models = {"pretrained": run.model, label(run.method): model} if run.model else {label(run.method): model}
        commands.insert(1, f"chat.gin --gin.MODELS={shlex.quote(json.dumps(models, ensure_ascii=False))}")
    where = f"Report: {report.with_suffix('.html')} and {report.name}"
    return "\n".join([where, "Next:", *(f"  {command}{each}" for each in commands)])


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or worse, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
