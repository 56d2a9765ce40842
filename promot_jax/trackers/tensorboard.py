"""TensorBoard: scalars, and outputs as text."""

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promot_jax.results.scores import Sample

_ENTITIES = {ord(c): f"&#{ord(c)};" for c in "`~\t"}  # what begins fenced code; tabs, which Markdown expands


class TensorBoard:
    """Writes an event file into a folder."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As of `Writer`: a curve of each name."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for tag, value in values.items():
            self._add(step, scalar_pb(tag, value))

    def outputs(self, step: int, samples: Sequence[Sample]) -> None:
        """As of `Writer`: a text of each task."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for task in dict.fromkeys(sample.task for sample in samples):
            text = "<hr>".join(as_html(sample) for sample in samples if sample.task == task)
            self._add(step, text_pb(f"generations/{task}", text))

    def close(self) -> None:
        """As of `Writer`."""
        self._file.close()

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def as_html(sample: Sample) -> str:
    """An output with its input and target, as HTML that shows every character of them.

    TensorBoard renders texts as Markdown, in which a block of HTML stays as it is, but for `_ENTITIES`.
    """
    parts = {"input": sample.input, "target": sample.target, "output": sample.output}
    return "".join(f"<p><strong>{name}</strong></p><pre>{_escaped(text)}</pre>" for name, text in parts.items())


def _escaped(text: str) -> str:
    """Text in HTML; control characters, which Markdown gives a meaning, and lone surrogates as escapes."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return html.escape("".join(shown)).translate(_ENTITIES)
