"""Control tokens within a text: marks that only a chat template's own control tokens have, never those of data.

Text that is data becomes no control token (`TokenizerVocabulary`). What a chat template writes around messages has to:
`marked` puts each between two noncharacters of Unicode, which stand for nothing in any text, and `encode` reads them.
Where a text comes from elsewhere, `unmarked` takes these characters out of it.
"""

import re
from collections.abc import Collection

START, END = "\ufdd2", "\ufdd3"
NO_SPACE = START + END  # at the end of an input: its target follows without a space
BEGIN = "\ufdd5"  # at the start of an input: its beginning of sequence, where no other text is before it
_MARKED = re.compile(f"{START}([^{START}{END}]*){END}")


def pattern(controls: Collection[str]) -> re.Pattern[str]:
    """The control tokens as a pattern; the longest one wins. Of none it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)")


def marked(text: str, controls: Collection[str]) -> str:
    """The text with every control token in it marked."""
    return pattern(controls).sub(lambda match: mark(match[0]), text)


def mark(control: str) -> str:
    """One control token, marked."""
    return f"{START}{control}{END}"


def known(text: str, controls: Collection[str]) -> str:
    """The text in which control tokens that a tokenizer does not have are text."""
    return _MARKED.sub(lambda match: match[0] if match[1] in controls else match[1], text)


def unmarked(text: str) -> str:
    """The text as a person reads it, and as it comes in with data: without marks."""
    return text.replace(START, "").replace(END, "").replace(BEGIN, "")
