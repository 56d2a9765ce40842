"""Rows of the demo's tasks: real data from small packages, fetched when a task is first read.

| source | package | licence |
|---|---|---|
| movie snippets, product reviews, news editorials, each rated by 20 people from -4 to 4 (Hutto and Gilbert, ICWSM 2014) | vaderSentiment 3.3.2, source distribution | MIT package of third-party texts: fetched, never copied |
| countries | countryinfo 1.0.1, installed with the extra `demo` | MIT; facts as the package states them |
| interface texts of JupyterLab, translated by its community | jupyterlab-language-pack-fr-FR 4.5.post3 | BSD-3-Clause |
| inflections (from the SPECIALIST Lexicon of the NIH) | lemminflect 0.2.3 | MIT |

Every public function without arguments returns {split: rows}. A hash of a row's id decides its split, so that neither
the order of the rows nor the number of hosts matters; the sizes are exact.
"""  # noqa: E501  a table

import collections
import functools
import gzip
import html
import importlib.util
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from promot_jax import assets
from promot_jax.data.examples import stable_hash
from promot_jax.errors import UserError

Row = dict[str, str]
Splits = dict[str, list[Row]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MAX_WORDS = 25  # longer texts make the demo slower, not better
_SOUTH_AMERICA = _words(
    "Argentina Bolivia Brazil Chile Colombia Ecuador Guyana Paraguay Peru Suriname Uruguay Venezuela"
)
_NOT_STATES = frozenset({"Hong Kong", "Macau", "Puerto Rico", "Réunion", "Serbia and Montenegro"})
_AUXILIARIES = _words("is are was were can could must should will would")
# Words that mark a second clause or a negation: one more "not" would not negate the whole sentence.
_CLAUSES = _words(
    "although and as because but hardly how if like neither never no nobody none nor not nothing or since so than that "
    "though unless until what when where whether which while who why"
)
_DETERMINERS = _words(
    "a all an another her his its many most my one our some such that the their these this those your he it she there "
    "they we you everything"
)


def split(rows: Iterable[Row], test: int, validation: int, by: str = "") -> Splits:
    """Splits rows into test, validation and train (the rest) by a hash of their ids.

    Args:
      rows: each with a distinct `id`.
      test: rows of the test split.
      validation: rows of the validation split.
      by: a field whose values are equally frequent in test and validation, for balanced splits; "" for none.

    Returns:
      The splits, each in the order of the hashes.
    """
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in _by_hash(rows):
        groups[row[by] if by else ""].append(row)
    first, second = test // max(len(groups), 1), (test + validation) // max(len(groups), 1)
    parts = {"train": slice(second, None), "validation": slice(first, second), "test": slice(first)}
    return {name: _by_hash(row for rows in groups.values() for row in rows[part]) for name, part in parts.items()}


def _by_hash(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: stable_hash(row["id"]))


@dataclass(frozen=True)
class Snippet:
    """A text of the VADER corpora: its id there, its mean rating (-4 to 4), the text with clean quotes and spaces."""

    id: str
    rating: float
    text: str


@functools.cache
def snippets(corpus: str) -> tuple[Snippet, ...]:
    """Returns the corpus "movie", "amazon", "nyt" or "tweets", without texts whose letters occurred before."""
    seen: dict[str, Snippet] = {}
    lines = (assets.fetch("vader-sentiment") / f"{corpus}.txt").read_text("utf-8").split("\n")
    for line in filter(str.strip, lines):
        name, rating, raw = line.split("\t")
        text = " ".join(html.unescape(raw).replace("''", '"').split())
        seen.setdefault(re.sub(r"\W", "", text.lower()), Snippet(f"{corpus}/{name}", float(rating), text))
    return tuple(seen.values())


def _rated(corpus: str, clear: float, names: tuple[str, str], most: int | None = None) -> list[Row]:
    """Returns as many texts rated `clear` or more as -`clear` or less: rows id, text, answer (of `names`)."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for snippet in sorted(snippets(corpus), key=lambda s: stable_hash(s.id)):
        if abs(snippet.rating) >= clear and 4 <= len(snippet.text.split()) <= _MAX_WORDS:
            answer = names[0] if snippet.rating > 0 else names[1]
            rows[answer].append({"id": snippet.id, "text": snippet.text, "answer": answer})
    each = min(len(group[:most]) for group in rows.values())
    return [row for group in rows.values() for row in group[:each]]


@functools.cache
def movie_reviews() -> Splits:
    """Rows id, text, answer ("True": positive): 4,668 / 500 / 500, balanced."""
    return split(_rated("movie", 1.25, ("True", "False"), most=2834), test=500, validation=500, by="answer")


@functools.cache
def product_reviews() -> Splits:
    """Rows id, text, answer ("positive", "negative"), balanced."""
    return split(_rated("amazon", 1.8, ("positive", "negative")), test=100, validation=50, by="answer")


@functools.cache
def tweets() -> Splits:
    """Rows id, text, answer ("good", "bad"), balanced."""
    return split(_rated("tweets", 1.25, ("good", "bad")), test=200, validation=100, by="answer")


@functools.cache
def editorials() -> Splits:
    """Rows id, text: sentences of newspaper editorials, 12 words or more: 3,511 / 100 / 100; generic text."""
    rows = [{"id": s.id, "text": s.text} for s in snippets("nyt") if len(s.text.split()) >= 12]
    return split(rows, test=100, validation=100)


@functools.cache
def negations() -> Splits:
    """Rows id, statement, negation: sentences of reviews and editorials with exactly one "is", "was", "will", ..."""
    rows = []
    for name, subject, verb, rest in _statements():
        before, after = _sentence([*subject, verb, *rest]), _sentence([*subject, verb, "not", *rest])
        rows.append({"id": name, "statement": before, "negation": after})
    return split(rows, test=100, validation=30)


@functools.cache
def questions() -> Splits:
    """Rows id, statement, question: sentences whose subject is simple enough to follow the verb in a question."""
    rows = []
    for name, subject, verb, rest in _statements():
        if subject[0] in _DETERMINERS and not any("," in word for word in rest):
            before, after = _sentence([*subject, verb, *rest]), _sentence([verb, *subject, *rest], "?")
            rows.append({"id": name, "statement": before, "question": after})
    return split(rows, test=100, validation=20)


@functools.cache
def unedited() -> Splits:
    """Rows id, edited, raw: sentences of editorials; `raw` lacks capitals, commas and the full stop."""
    rows = []
    for snippet in snippets("nyt"):
        text = snippet.text
        if re.fullmatch(r"[A-Z][A-Za-z' ,]*[.?]", text) and 5 <= len(text.split()) <= 12:
            rows.append({"id": snippet.id, "edited": text, "raw": re.sub(r"[,.?]", "", text).lower()})
    return split(rows, test=100, validation=50)


@functools.cache
def interface_texts() -> Splits:
    """Rows id, english, french: menu entries, settings and messages of 2 to 14 words without code or placeholders."""
    seen: dict[str, Row] = {}
    for name in ("jupyterlab", "jupyterlab_git", "jupyterlab_lsp"):
        texts = json.loads((assets.fetch("jupyterlab-french") / f"{name}.json").read_text("utf-8"))
        for key, (french, *_) in sorted((key, value) for key, value in texts.items() if isinstance(value, list)):
            english = " ".join(key.rpartition("\x04")[2].split())  # after an optional context
            french = " ".join(french.split())
            plain = not re.search(r"[%{}<>`_]|://", english + french)
            if plain and french not in ("", english) and 2 <= len(english.split()) <= 14:
                letters = re.sub(r"\W", "", english.lower())
                seen.setdefault(letters, {"id": f"{name}/{letters}", "english": english, "french": french})
    return split(seen.values(), test=200, validation=100)


def _statements() -> Iterator[tuple[str, list[str], str, list[str]]]:
    """Yields (id, subject, verb, rest); the first word is in lower case if it is a determiner or a pronoun."""
    for snippet in snippets("amazon") + snippets("nyt"):
        words = snippet.text.removesuffix(".").split()
        if not re.fullmatch(r"[A-Za-z][A-Za-z' ,-]*[a-z]\.", snippet.text) or not 4 <= len(words) <= 14:
            continue
        plain = [word.lower().strip(",") for word in words]
        verbs = [i for i, word in enumerate(plain) if word in _AUXILIARIES]
        contracted = any("'" in word and not word.endswith("'s") for word in plain)
        if len(verbs) != 1 or contracted or not _CLAUSES.isdisjoint(plain):
            continue
        verb = verbs[0]
        if 1 <= verb <= 5 and verb < len(words) - 1 and not any("," in word for word in words[: verb + 1]):
            first = plain[0] if plain[0] in _DETERMINERS else words[0]
            yield snippet.id, [first, *words[1:verb]], words[verb], words[verb + 1 :]


def _sentence(words: Sequence[str], end: str = ".") -> str:
    text = " ".join(words) + end
    return text[0].upper() + text[1:]


@functools.cache
def countries() -> Splits:
    """Rows id, country, capital, continent, nationality, passage, question, answer.

    States of at least half a million people, names without accents. States whose name reveals the capital (Mexico
    City), or that the package describes incompletely, are left out.
    """
    package = importlib.util.find_spec("countryinfo")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "The demo's tasks on countries need the package countryinfo: pip install 'promot_jax[demo]', or set "
            "ICL_MIXTURE to other tasks."
        )
    rows: dict[str, Row] = {}
    for path in sorted((Path(package.submodule_search_locations[0]) / "data").glob("*.json")):
        entry = json.loads(path.read_text("utf-8"))
        fields = [entry.get(field) for field in ("name", "capital", "demonym", "region", "subregion", "population")]
        if all(fields) and isinstance(entry["capital"], str) and entry["name"] not in _NOT_STATES:
            row = _country(*fields)
            if entry["population"] >= 500_000 and not _reveals(row["country"], row["capital"]):
                rows[row["id"]] = row
    return split(rows.values(), test=100, validation=20)


def _country(name: str, capital: str, demonym: str, region: str, subregion: str, population: float) -> Row:
    country, capital = _ascii(name.removeprefix("The ")), _ascii(capital)
    america = "South America" if country in _SOUTH_AMERICA else "North America"
    people = f"{population / 1e6:.1f} million"
    questions = (
        (f"What is the capital of {country}?", capital),
        (f"Where does {country} lie?", subregion),
        (f"How many people live in {country}?", people),
    )
    question, answer = questions[int(stable_hash("question", country), 16) % len(questions)]
    return {
        "id": country,
        "country": country,
        "capital": capital,
        "continent": america if region == "Americas" else region,
        "nationality": demonym.split(",")[0],
        "passage": f"{country} lies in {subregion}. Its capital is {capital}; {people} people live there.",
        "question": question,
        "answer": answer,
    }


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _reveals(country: str, capital: str) -> bool:
    """Returns whether a word of one name, of four letters or more, is in the other name."""
    country, capital = country.lower(), capital.lower()
    words = [word for word in f"{country} {capital}".split() if len(word) > 3]
    return any(word in country and word in capital for word in words)


@functools.cache
def past_tenses() -> Splits:
    """Rows id, verb, past: verbs whose past tense is more than the verb and "-(e)d"."""
    rows = [row for row in _inflections("verb", "past") if row["past"] not in {f"{row['verb']}d", f"{row['verb']}ed"}]
    return split(rows, test=100, validation=20)


@functools.cache
def inflection_choices() -> Splits:
    """Rows id, question, a, b, c, d, answer ("A" to "D"): which form of a verb is asked for, by letter.

    Verbs of the texts that are not in `past_tenses`; all questions on a verb are in one split.
    """
    others = {row["verb"] for rows in past_tenses().values() for row in rows}
    verbs: list[Row] = []
    for verb, *forms in _inflected("verb"):
        past, participle, present, third = [*forms, "", "", ""][:4]
        other = participle or verb
        if verb not in others and {verb, past} <= _vocabulary() and len({past, present, third, other} - {""}) == 4:
            verbs.append({"id": verb, "past tense": past, "-ing form": present, "third person": third, "other": other})
    asked = ("past tense", "-ing form", "third person")
    parts = split(verbs, test=72, validation=36)
    return {
        name: [
            _choice(row, form, letter)
            for (row, form), letter in zip(itertools.product(rows, asked), itertools.cycle("ABCD"), strict=False)
        ]
        for name, rows in parts.items()
    }


def _choice(row: Row, asked: str, answer: str) -> Row:
    """The question on a form of a verb whose answer is a given letter; a hash orders the other forms."""
    name = f"{row['id']}/{asked}"
    forms = [form for key, form in row.items() if key not in ("id", asked)]
    forms.sort(key=lambda form: stable_hash(name, form))
    forms.insert("ABCD".index(answer), row[asked])
    options = dict(zip("abcd", forms, strict=True))
    return {"id": name, "question": f'What is the {asked} of "{row["id"]}"?', "answer": answer, **options}


@functools.cache
def plurals() -> Splits:
    """Rows id, noun, plural, ending: half of the nouns take "s", half do not."""
    groups: dict[str, list[Row]] = {"s": [], "other": []}
    for row in _by_hash(_inflections("noun", "plural")):
        ending = "s" if row["plural"] == f"{row['noun']}s" else "other"
        groups[ending].append(row | {"ending": ending})
    smaller = min(map(len, groups.values()))
    return split((row for group in groups.values() for row in group[:smaller]), test=100, validation=20, by="ending")


def _inflections(kind: str, form: str) -> Iterator[Row]:
    """Yields rows id, <kind>, <form>, for words that the reviews and editorials use in both forms.

    Words with several accepted forms are left out: only one would count as right.
    """
    vocabulary = _vocabulary()
    for word, first, *_ in _inflected(kind):
        if word != first and {word, first} <= vocabulary:
            yield {"id": word, kind: word, form: first}


def _inflected(kind: str) -> Iterator[list[str]]:
    """Yields [word, its forms ...] of a part of speech; a form may be "" or missing at the end."""
    with gzip.open(assets.fetch("lemminflect") / "infl_lu.csv.gz", "rt", encoding="utf-8") as file:
        for word, tag, *forms in (line.rstrip("\n").split(",") for line in file):
            if tag == kind:
                yield [word, *forms]


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Returns the words of at least two letters in the reviews and editorials."""
    texts = snippets("movie") + snippets("amazon") + snippets("nyt")
    return frozenset(word for s in texts for word in re.findall(r"[a-z]{2,}", s.text.lower()))
