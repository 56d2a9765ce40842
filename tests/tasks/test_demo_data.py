"""The rules that make rows, on a few hand-written lines in the layout of the packages' files."""

import functools
import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax import assets
from promot_jax.errors import UserError
from promot_jax.tasks import demo_data

CORPORA = {
    "amazon": [
        "1_1\t1.0\tthe menus are very easy to navigate.",
        "1_2\t1.0\tThe menus are very easy to navigate.",  # again, but for a capital
        "1_3\t1.0\tit is small and it is light.",  # two clauses
        "1_4\t1.0\tthis isn't what i expected.",  # negated already
        "1_5\t1.0\tno support is given here.",  # negated already
        "1_6\t1.0\twhat is the matter with it?",
        "1_7\t1.0\tcolor screen is good.",
        "1_8\t3.0\tone of the best &amp; smallest phones",
        "1_9\t-3.0\tit broke after one day",
    ],
    "nyt": [
        "1_1\t0.1\tThe Mayor's plan should be adopted, officials say.",
        "1_2\t0.1\tWe must act at once.",
        "1_3\t0.1\tStories, babies and men ran; the cities stopped.",
        "1_4\t0.1\tHe stopped, and they stop.",
        "1_5\t0.1\tOne menu, two menus",
    ],
    "movie": [
        "1\t2.0\tA ''story'' of a baby, a man, a city",
        "2\t-2.0\tRun from it, as i ran",
        "3\t1.0\tnot so clear",
    ],
}
INFLECTIONS = """run,verb,ran,run,running,runs
stop,verb,stopped,,stopping,stops
say,verb,said,,saying,says
love,verb,loved,,loving,loves
get,verb,got,got/gotten,getting,gets
story,noun,stories
baby,noun,babies
man,noun,men
menu,noun,menus
city,noun,cities/citys
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The packages, replaced; the folder of the countries' files."""
    for corpus, lines in CORPORA.items():
        (tmp_path / f"{corpus}.txt").write_text("\n".join(lines) + "\n")
    with gzip.open(tmp_path / "infl_lu.csv.gz", "wt") as file:
        file.write(INFLECTIONS)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    forget()
    yield tmp_path / "data"
    forget()


def forget() -> None:
    for value in vars(demo_data).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


def every(splits: demo_data.Splits) -> list[demo_data.Row]:
    return sorted((row for rows in splits.values() for row in rows), key=lambda row: row["id"])


def test_texts_are_cleaned_and_taken_once(sources: Path) -> None:
    texts = {s.id: s.text for corpus in CORPORA for s in demo_data.snippets(corpus)}

    assert texts["amazon/1_8"] == "one of the best & smallest phones"
    assert texts["movie/1"] == 'A "story" of a baby, a man, a city'
    assert "amazon/1_2" not in texts


def test_rated_texts(sources: Path) -> None:
    assert [(r["text"][:10], r["answer"]) for r in every(demo_data.movie_reviews())] == [
        ('A "story" ', "True"),
        ("Run from i", "False"),
    ]
    assert [(r["id"], r["answer"]) for r in every(demo_data.product_reviews())] == [
        ("amazon/1_8", "positive"),
        ("amazon/1_9", "negative"),
    ]


def test_negation(sources: Path) -> None:
    assert [(r["statement"], r["negation"]) for r in every(demo_data.negations())] == [
        ("The menus are very easy to navigate.", "The menus are not very easy to navigate."),
        ("Color screen is good.", "Color screen is not good."),
        (
            "The Mayor's plan should be adopted, officials say.",
            "The Mayor's plan should not be adopted, officials say.",
        ),
        ("We must act at once.", "We must not act at once."),
    ]


def test_question(sources: Path) -> None:
    assert [(r["statement"], r["question"]) for r in every(demo_data.questions())] == [
        ("The menus are very easy to navigate.", "Are the menus very easy to navigate?"),
        ("We must act at once.", "Must we act at once?"),
    ]


def test_unedited(sources: Path) -> None:
    assert [(r["raw"], r["edited"]) for r in every(demo_data.unedited())] == [
        ("the mayor's plan should be adopted officials say", "The Mayor's plan should be adopted, officials say."),
        ("we must act at once", "We must act at once."),
        ("he stopped and they stop", "He stopped, and they stop."),
    ]


def test_interface_texts(sources: Path) -> None:
    texts: dict[str, object] = {
        "": {"language": "fr_FR"},
        "menu\x04Open  the file": ["Ouvrir le fichier"],
        "Open the File…": ["Ouvrir un fichier…"],  # again, but for a capital and a mark
        "Close": ["Fermer"],
        "Delete %1 files": ["Supprimer %1 fichiers"],
        "Not translated": [""],
        "Table Widget": ["Table Widget"],
        "Cell moved": ["Cellule déplacée", "Cellules déplacées"],
    }
    for name, content in (
        ("jupyterlab", texts),
        ("jupyterlab_git", {}),
        ("jupyterlab_lsp", {"Cell\nmoved": ["Autre"]}),
    ):
        (sources.parent / f"{name}.json").write_text(json.dumps(content))

    assert [(r["english"], r["french"]) for r in every(demo_data.interface_texts())] == [
        ("Cell moved", "Cellule déplacée"),
        ("Open the File…", "Ouvrir un fichier…"),
    ]


def test_inflections_of_words_in_use(sources: Path) -> None:
    assert [(r["verb"], r["past"]) for r in every(demo_data.past_tenses())] == [("run", "ran"), ("stop", "stopped")]
    # As many with "-s" as without; "city" has two plurals.
    plurals = [(r["noun"], r["plural"]) for r in every(demo_data.plurals())]
    assert ("menu", "menus") in plurals
    assert len(plurals) == 2
    assert set(plurals) < {("menu", "menus"), ("baby", "babies"), ("man", "men"), ("story", "stories")}


def country(folder: Path, name: str, **changes: object) -> None:
    facts = {
        "name": name,
        "capital": "Bogotá",
        "demonym": "Testan,Testish",
        "region": "Americas",
        "subregion": "Latin America",
        "population": 1_260_000,
    }
    (folder / f"{name}.json").write_text(json.dumps(facts | changes))


def test_countries(sources: Path) -> None:
    country(sources, "Colombia")
    country(sources, "The Testlands", region="Asia", population=600_123)
    country(sources, "Smallville", population=400_000)
    country(sources, "Bogota Republic")
    country(sources, "Nowhere", capital="")
    country(sources, "Two Seats", capital=["A", "B"])
    country(sources, "Hong Kong")

    first, second = every(demo_data.countries())

    assert (first["country"], first["capital"], first["continent"]) == ("Colombia", "Bogota", "South America")
    assert (second["country"], second["continent"], second["nationality"]) == ("Testlands", "Asia", "Testan")
    assert first["passage"] == ("Colombia lies in Latin America. Its capital is Bogota; 1.3 million people live there.")
    for row in (first, second):
        assert row["country"] in row["question"]
        assert row["answer"] in row["passage"]


def test_countries_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match="need the package countryinfo: pip install"):
        demo_data.countries()


ROWS = st.lists(st.tuples(st.integers(0, 99), st.sampled_from("xyz")), max_size=40, unique_by=lambda pair: pair[0]).map(
    lambda pairs: [{"id": str(i), "kind": kind} for i, kind in pairs]
)


@given(ROWS, st.integers(0, 12), st.integers(0, 12), st.randoms(use_true_random=False))
def test_splits_share_nothing_and_do_not_depend_on_the_order(
    rows: list[demo_data.Row], test: int, validation: int, order: object
) -> None:
    dealt = demo_data.split(rows, test, validation)

    assert every(dealt) == sorted(rows, key=lambda row: row["id"])
    assert len(dealt["test"]) == min(test, len(rows))
    assert len(dealt["validation"]) == min(validation, len(rows) - len(dealt["test"]))
    shuffled = order.sample(rows, len(rows))  # type: ignore[attr-defined]
    assert demo_data.split(shuffled, test, validation) == dealt


def test_balanced_splits() -> None:
    rows = [{"id": str(i), "answer": "yes" if i % 3 else "no"} for i in range(90)]

    dealt = demo_data.split(rows, test=20, validation=10, by="answer")

    answers = {name: [row["answer"] for row in part] for name, part in dealt.items()}
    assert {name: part.count("no") for name, part in answers.items()} == {"test": 10, "validation": 5, "train": 15}
    assert {name: len(part) for name, part in answers.items()} == {"test": 20, "validation": 10, "train": 60}
    assert answers["train"] != sorted(answers["train"])
