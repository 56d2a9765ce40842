"""Control tokens within a text: marks that only a chat template's own control tokens have, never those of data.

Text that is data becomes no control token (`TokenizerVocabulary`). What a chat template writes around messages has to:
`marked` puts each between two noncharacters of Unicode, which stand for nothing in any text, and `encode` reads them.
"""

import re
from collections.abc import Collection

START, END = "\ufdd2", "\ufdd3"
_MARKED = re.compile(f"{START}([^{END}]*){END}")


def pattern(controls: Collection[str]) -> re.Pattern[str]:
    """The control tokens as a pattern; the longest one wins. Of none it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)")


def marked(text: str, controls: Collection[str]) -> str:
    """The text with every control token in it marked."""
    return pattern(controls).sub(lambda match: f"{START}{match[0]}{END}", text)


def unmarked(text: str) -> str:
    """The text as a person reads it, and as it comes in with data: without marks."""
    return text.replace(START, "").replace(END, "")


def pieces(text: str) -> list[str]:
    """Cuts a text at marked control tokens: text, token, text, ..., token, text."""
    return _MARKED.split(text)
