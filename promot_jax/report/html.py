"""HTML, SVG and CSS from the templates in `page/templates`: data can never be markup, and every character of it shows.

Templates escape every value (autoescape), and `render` makes the whole output `visible`: neither can be forgotten for
a new value. An undefined name in a template is an error.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Control characters, line and paragraph separators, direction overrides and isolates, lone surrogates.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "page" / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def visible(text: str) -> str:
    """Text with what would not show, or would reorder what stands around it, replaced by U+FFFD.

    Those are control characters, direction overrides and lone surrogates. Line breaks become one kind, tabs stay.
    """
    return _HIDDEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def render(template: str, /, **context: Any) -> Markup:
    """The output of a template, a file in `page/templates`; of the values it names all but `Markup` is escaped."""
    return Markup(visible(environment.get_template(template).render(context)))
