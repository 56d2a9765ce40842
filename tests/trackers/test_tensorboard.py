"""Outputs as TensorBoard shows them: as text, whatever is in them."""

import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from promot_jax.results.scores import Sample
from promot_jax.trackers.tensorboard import TensorBoard, as_html

with warnings.catch_warnings():  # of its own copy of html5lib
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard import plugin_util

HOSTILE = (
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "text\n\n<script>\n\nalert(1)</script>\n\n# head\n- *item*\n```\n<b>\n```",
    "[a](javascript:alert(1)) <a href='javascript:alert(1)'>b</a> <javascript:alert(1)>",
    "&lt;script&gt; &amp; &#60;script&#62;",
    "\x02wzxhzdk:0\x03 \x00 \x1b[2K",
    "| a |\n|---|\n| <td> |",
    "    <script>",
    "<!-- <pre> --><![CDATA[<script>]]><?php ?>",
)


class Shown(HTMLParser):
    """The elements of a page, and the text in each `pre`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.texts: list[str] = []
        self._within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        assert not attrs
        self._within = tag == "pre"
        self.texts += [""] * self._within

    def handle_endtag(self, tag: str) -> None:
        self._within = False

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[-1] += data


def sample(text: str) -> Sample:
    return Sample(task="t", input=text, target=text, output=text)


@pytest.mark.parametrize("render", [plugin_util.markdown_to_safe_html, plugin_util.safe_html, lambda page: page])
@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_an_output_is_shown_and_does_nothing(text: str, render: object) -> None:
    """As TensorBoard renders it, with Markdown and without; and even if it did not remove what it does not allow."""
    shown = Shown(render(as_html(sample(text))))
    assert shown.elements == {"p", "strong", "pre"}
    visible = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    assert shown.texts == [visible] * 3


@given(st.lists(st.sampled_from([*"ab`~<>&;#*_[]()!|-=\\\n \t", "```", "~~~", "<b>", "</pre>", "    "])).map("".join))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    shown = Shown(plugin_util.markdown_to_safe_html(as_html(sample(text))))
    assert shown.elements == {"p", "strong", "pre"}
    # Lines of spaces are empty then; and after `<pre>`, HTML ignores a line break.
    assert [as_lines(one) for one in shown.texts] == [as_lines(text)] * 3


def as_lines(text: str) -> str:
    return "\n".join(line if line.strip(" ") else "" for line in text.split("\n")).strip("\n")


def test_each_task_has_a_text_at_each_evaluation(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path)
    samples = [Sample(task=task, input=f"{task} {n}", target="", output=str(n)) for task in ("a", "b") for n in (1, 2)]
    for step in (0, 5):
        writer.scalars(step, {"eval/target": step / 2})
        writer.outputs(step, samples)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]} == {
        "eval/target": [0, 5],
        "generations/a": [0, 5],
        "generations/b": [0, 5],
    }
    page = events.Tensors("generations/b")[0].tensor_proto.string_val[0].decode()
    assert Shown(page).texts == ["b 1", "", "1", "b 2", "", "2"]
