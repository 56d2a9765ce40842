"""Markup: what is data stays data."""

import html
from xml.etree import ElementTree

import pytest
from hypothesis import given
from random_results import NASTY

from promot_jax.report.html import Markup, escape, join, tag, visible


@given(NASTY, NASTY)
def test_any_text_survives_as_text(text, value):
    element = tag("p", text, title=value)
    assert "<" not in element.removeprefix("<p").removesuffix("</p>") and element.count(">") == 2
    parsed = ElementTree.fromstring(element)
    assert parsed.text in (visible(text), None if not text else visible(text))
    # XML folds line breaks and tabs of an attribute into spaces; HTML does not.
    assert parsed.attrib["title"] == visible(value).replace("\n", " ").replace("\t", " ")
    assert html.unescape(escape(text)) == visible(text)


def test_markup_is_not_escaped_again_but_joined_text_is():
    assert tag("b", tag("i", "<")) == "<b><i>&lt;</i></b>"
    assert join("<", None, Markup("<br>")) == "&lt;<br>"
    assert escape(escape("&")) == "&amp;"
    assert not isinstance(Markup("<br>") + "<script>", Markup)  # what is put together by hand is data again


def test_attributes():
    made = tag("input", class_="a", data_task="t", hidden=True, value=0, title=None, disabled=False)
    assert made == '<input class="a" data-task="t" hidden value="0">'


@pytest.mark.parametrize("text", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\ud800", "\u2028", "\x7f"])
def test_what_would_not_show_is_replaced(text):
    assert visible(f"a{text[0]}b") == "a\ufffdb"
    assert visible("a\r\nb\rc\td") == "a\nb\nc\td"
