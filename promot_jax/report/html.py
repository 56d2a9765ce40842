"""HTML and SVG from Python values: every text is escaped unless it was built here, so that data can never be markup."""

import html
import unicodedata
from typing import Any

VOID = ("br", "hr", "input", "link", "meta")  # no content, no end tag
_BIDIRECTIONAL = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


class Markup(str):
    """Text that is markup already."""


def visible(text: str) -> str:
    """Text with what would not show, or would reorder what stands around it, replaced by U+FFFD.

    Those are control characters, direction overrides and lone surrogates. Line breaks become one kind, tabs stay.
    """
    if text.isprintable():  # nearly always, and much faster to tell
        return text
    return "".join(map(_visible, text.replace("\r\n", "\n").replace("\r", "\n")))


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return "\ufffd" if hidden or unicodedata.bidirectional(character) in _BIDIRECTIONAL else character


def escape(value: Any) -> Markup:
    """A value as text that is safe between tags and in quoted attributes; markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(visible(str(value))))


def join(*children: Any) -> Markup:
    """Children one behind the other, None left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        name: of the element; never data.
        *children: markup, or text to be escaped; None is left out.
        **attributes: values are escaped. `_` in a name becomes `-`, one at its end is dropped (`class_`, `data_task`);
            True stands without a value, None and False are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.removesuffix("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{escape(value)}"')
    start = f"<{' '.join(parts)}>"
    return Markup(start if name in VOID else f"{start}{join(*children)}</{name}>")
