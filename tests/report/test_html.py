"""Templates: what is data stays data, and all of it shows."""

import html
import re
import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from jinja2 import DictLoader, UndefinedError
from markupsafe import Markup
from random_results import NASTY

from promot_jax.report.html import environment, render, visible

TEMPLATES = [environment.get_template(name) for name in environment.list_templates()]
BIDIRECTIONAL = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


@pytest.fixture(name="template", scope="module", autouse=True)
def _template():
    """One template in the place of the page's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "loader", DictLoader({"p.html": '<p title="{{ title }}">{{ text }}</p>'}))
        yield


@given(NASTY, NASTY)
def test_any_text_survives_as_text(text, title):
    element = render("p.html", text=text, title=title)
    assert "<" not in element.removeprefix("<p").removesuffix("</p>") and element.count(">") == 2
    parsed = ElementTree.fromstring(element)
    assert parsed.text in (visible(text), None if not text else visible(text))
    # XML folds line breaks and tabs of an attribute into spaces; HTML does not.
    assert parsed.attrib["title"] == visible(title).replace("\n", " ").replace("\t", " ")
    assert html.unescape(element.removesuffix("</p>").rpartition(">")[2]) == visible(text)


def test_markup_is_not_escaped_again_but_what_is_put_together_by_hand_is():
    assert render("p.html", title="&", text=Markup("<br>")) == '<p title="&amp;"><br></p>'
    assert render("p.html", title="", text=Markup("<br>") + "<script>") == '<p title=""><br>&lt;script&gt;</p>'
    assert "\u202e" not in render("p.html", title="", text=Markup("\u202e"))


def test_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("p.html", text="")


def test_no_template_turns_escaping_off_or_leaves_a_value_outside_quotes():
    assert {"page.html", "plot.svg"} <= {template.name for template in TEMPLATES}
    for template in TEMPLATES:
        with open(template.filename, encoding="utf-8") as file:
            source = file.read()
        assert not re.search(r"\bsafe\b|autoescape|=\s*\{\{", source), template.name


@pytest.mark.parametrize("text", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\ud800", "\u2028", "\x7f"])
def test_what_would_not_show_is_replaced(text):
    assert visible(f"a{text[0]}b") == "a\ufffdb"
    assert visible("a\r\nb\rc\td") == "a\nb\nc\td"


def test_every_hidden_character_is_replaced_and_no_other():
    for character in map(chr, range(0x110000)):
        hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        hidden |= unicodedata.bidirectional(character) in BIDIRECTIONAL
        if character not in "\n\r\t":
            assert visible(character) == ("\ufffd" if hidden else character)
