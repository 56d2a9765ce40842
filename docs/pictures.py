"""Draws the diagrams of method.md: `python docs/pictures.py` writes them into docs/figures/.

Each picture has a light card of its own, so that it reads the same on a light and on a dark page.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from promot_jax.report.svg import COLORS

FOLDER = Path(__file__).parent / "figures"
INK, DIM, RULE, CARD, MOVES, PROMPT = (COLORS[name][0] for name in ("ink", "dim", "rule", "card", "h0", "h1"))
FILLS = {"trained": "#ffe9dc", "frozen": "#eef1f7", "prompt": "#e3f0fb"}
DOTTED = f'fill="none" stroke="{MOVES}" stroke-width="1.8" stroke-dasharray="3 3"'
STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.title { font-weight: 600; font-size: 15px; }
.small { font-size: 12.5px; }
.lost { font-weight: 600; }
"""
LABELS = ("True", "False")
# (task, question, output of the pretrained model, output after fine-tuning): the first test examples of ICL tasks,
# 1 shot, by `finetune.gin --gin.EVAL_PERIOD=60` and `icl_eval.gin`, seed 0, SmolLM2-135M.
OUTPUTS: tuple[tuple[str, str, str, str], ...] = ()
REVIEW = "A delight from start to end. ... answer:"
CAPITAL = "Country: Japan, Capital: Tokyo; Country: Peru, Capital:"


def text(x: float, y: float, words: str, *, color: str = INK, kind: str = "", anchor: str = "middle") -> str:
    """A line of text; `y` is its base line."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}"{name}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, state: str) -> str:
    """A box: orange where it is trained, dashed where it is frozen, else plain."""
    edge = {"trained": MOVES, "prompt": PROMPT}.get(state, DIM)
    more = ' stroke-dasharray="5 4"' if state == "frozen" else ""
    weight = 2.5 if state == "trained" else 1.4
    fill = FILLS.get(state, CARD)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="7"'
    return f'<rect {place} fill="{fill}" stroke="{edge}" stroke-width="{weight}"{more}/>'


def arrow(x: float, start: float, end: float) -> str:
    """An arrow upwards from `start` to `end`."""
    line = f'<path d="M{x} {start}V{end + 7}" fill="none" stroke="{DIM}" stroke-width="1.8"/>'
    return line + f'<path d="M{x} {end}l-5 7h10Z" fill="{DIM}"/>'


def model(left: float, *, prompt: str, weights: str, words: str, answer: str, training: bool) -> list[str]:
    """The model over its input and under its answer, 400 wide; `prompt` and `weights` are states, "" for none."""
    middle, parts = left + 200, []
    first = left + 118 if prompt else left
    if prompt:
        parts += [box(left + 18 * i, 214, 14, 34, prompt) for i in range(6)]
        note = f"soft prompt, {prompt}" if training else "soft prompt"
        parts.append(text(left + 52, 268, note, color=MOVES if prompt == "trained" else DIM, kind="small"))
        parts.append(arrow(left + 52, 210, 172))
    width = left + 400 - first
    parts += [box(first, 214, width, 34, ""), text(first + width / 2, 236, words, kind="small")]
    parts.append(arrow(first + width / 2, 210, 172))
    parts += [box(left, 112, 400, 58, weights), text(middle, 136, "language model")]
    note = f"134.5M weights, {weights}" if training else "134.5M weights, after stage 2"
    parts.append(text(middle, 157, note, color=MOVES if weights == "trained" else DIM, kind="small"))
    parts += [arrow(middle, 108, 84), text(middle, 74, answer)]
    if training and prompt == "trained":  # around the frozen model, into the prompt
        parts.append(f'<path d="M{middle - 24} 69H{left - 34}V231H{left - 12}" {DOTTED}/>')
        parts.append(f'<path d="M{left - 4} 231l-8 -5v10Z" fill="{MOVES}"/>')
        parts.append(text(left - 26, 90, "gradient", color=MOVES, kind="small", anchor="start"))
    elif training:
        parts.append(f'<path d="M{middle + 24} 69H{left + 345}V101" {DOTTED}/>')
        parts.append(f'<path d="M{left + 345} 109l-5 -8h10Z" fill="{MOVES}"/>')
        parts.append(text(left + 353, 90, "gradient", color=MOVES, kind="small", anchor="start"))
    return parts


def drawing(title: str, alt: str, size: tuple[int, int], parts: Sequence[str]) -> str:
    """An SVG file on a card, with its title and a description for those who do not see it."""
    width, height = size
    shapes = [text(width / 2, 28, title, kind="title"), *parts]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">\n<title>{escape(title)}</title>\n<desc>{escape(alt)}</desc>\n<style>{STYLE}</style>\n'
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="12" fill="{CARD}" stroke="{RULE}"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def stage1() -> str:
    """The prompt is trained under a frozen model."""
    alt = (
        "A soft prompt and a review go into a frozen language model, which is to answer True. "
        "The gradient of the loss goes to the soft prompt alone."
    )
    parts = model(120, prompt="trained", weights="frozen", words=REVIEW, answer="True", training=True)
    return drawing("Stage 1: the soft prompt is trained", alt, (640, 290), parts)


def stage2() -> str:
    """The model is trained under a frozen prompt."""
    alt = (
        "The same soft prompt, now frozen, and a review go into the language model, which is to answer True. "
        "The gradient of the loss goes to the model's weights alone."
    )
    parts = model(120, prompt="frozen", weights="trained", words=REVIEW, answer="True", training=True)
    return drawing("Stage 2: the model is trained, the soft prompt stays as it is", alt, (640, 290), parts)


def strip() -> str:
    """With the prompt for the task, without it for all others."""
    alt = (
        "Left: a review with the soft prompt prepended; the model answers True. "
        "Right: a question about a capital without the soft prompt; the same model answers Lima."
    )
    parts = model(30, prompt="prompt", weights="", words=REVIEW, answer="True", training=False)
    parts += model(470, prompt="", weights="", words=CAPITAL, answer="Lima", training=False)
    parts += [text(230, 290, "the fine-tuned task"), text(670, 290, "every other task: the prompt is left out")]
    return drawing("Strip: one model, with and without its soft prompt", alt, (900, 310), parts)


def format_problem() -> str:
    """What the model answers before and after standard fine-tuning."""
    rows = [f"{task}, {query}: {before}; after fine-tuning {after}." for task, query, before, after in OUTPUTS]
    alt = f"Outputs of the pretrained model and after standard fine-tuning on reviews, by question. {' '.join(rows)}"
    columns, parts = (24, 150, 440, 620), []
    for x, words in zip(columns, ("task", "question, after one exemplar", "pretrained", "fine-tuned"), strict=True):
        parts.append(text(x, 62, words, color=DIM, kind="small", anchor="start"))
    for index, row in enumerate(OUTPUTS):
        y = 92 + 28 * index
        parts.append(f'<path d="M24 {y - 19}H756" stroke="{RULE}"/>')
        for x, words in zip(columns, row, strict=True):
            lost = x == columns[3] and words in LABELS
            kind, color = ("lost", MOVES) if lost else ("", DIM if x == columns[0] else INK)
            parts.append(text(x, y, words, color=color, kind=kind, anchor="start"))
    title = "What a model answers, before and after fine-tuning on reviews"
    return drawing(title, alt, (780, 80 + 28 * len(OUTPUTS)), parts)


PICTURES = {
    "method_format": format_problem,
    "method_stage1": stage1,
    "method_stage2": stage2,
    "method_strip": strip,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), "utf-8")
