"""The page as text: complete, self-contained, and of a structure that no data can change."""

import base64
import functools
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_results import FIGURES, NASTY, TASKS, alignment, made, prune, random_document, random_results

from promot_jax import files as results
from promot_jax.errors import UserError
from promot_jax.report.html import visible
from promot_jax.report.page import page

VOID = ("br", "hr", "input", "link", "meta")  # no content, no end tag


class Structure(HTMLParser):
    """Start tags with the names of their attributes, in order, and the text between tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.values, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, tuple(key for key, _ in attributes)))
        self.values += [value for key, value in attributes if value]
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, text):
        self.texts.append(text)


def sampled(data, samples=3):
    """Results with sample outputs that methods share."""
    for method, runs in data["methods"].items():
        for run in runs:
            run["samples"] = [
                {
                    "task": task,
                    "shots": 1,
                    "input": f"exemplar\n\n{task} {index} {run['seed']}",
                    "target": "yes",
                    "output": f"{method} says {index}",
                }
                for task in TASKS
                for index in range(samples)
            ]
    return data


def test_everything_is_in_the_page(tmp_path):
    data = sampled(random_document())
    folder = tmp_path / "analyses" / "one"
    results.write(alignment(), folder / "results.json")
    path = page.write({"": made(data)}, tmp_path)
    text = path.read_text()
    for words in (
        page.TITLE,
        "random_weights",
        "sentiment",
        "0123456789ab-dirty",
        "0.10.2",
        "learning_rate",
        "Norm. Avg.",
    ):
        assert words in text
    charts = re.findall(r'data-chart="(\w+)"', text)
    assert charts[:8] == FIGURES
    assert {"gradient_alignment", "gradient_alignment_stripped", "curves"} <= set(charts)
    structure = Structure(text)
    for method in ("pretrained", "finetune", "promot"):
        assert f"{method} says 2" in structure.texts
    score = data["methods"]["promot"][0]["icl"]["4"]["tasks"]["capital"]["score"]
    assert f"{score:.5g}" in structure.texts
    assert page.write({"": made(data)}, tmp_path / "again").read_text() != text  # no alignment
    assert page.render({"": made(data)}, [alignment()], tmp_path) == text


def test_nothing_is_fetched_and_only_our_script_and_style_may_run():
    text = page.render({"": made(sampled(random_document()))})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    for name in ("style", "script"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
        files = Path(page.__file__).parent.glob({"style": "*.css", "script": "*.js"}[name])
        assert all(file.read_text("utf-8") in content for file in files)  # as they are, not escaped
    tags = Structure(text).tags
    attributes = {key for _, keys in tags for key in keys}
    assert not {key for key in attributes if key.startswith("on")} and not attributes & {
        "src",
        "srcset",
        "style",
        "action",
        "xlink:href",
    }
    assert all(
        value[0] in "#d" for value in re.findall(r'href="([^"]*)"', text)
    )  # places in the page, and an icon of no bytes
    assert not {name for name, _ in tags} & {"iframe", "object", "embed", "base", "img"}


@settings(max_examples=15)
@given(st.lists(NASTY, min_size=14, max_size=14))
@example([", a, b"] * 14)
def test_no_text_from_data_becomes_markup(wild):
    """The page of wild strings has the tags and attributes of the page of tame ones, and shows the strings."""
    wild = [f"{text}{index}" for index, text in enumerate(wild)]  # different ones, and never empty
    found, expected = _made(tuple(wild)), _made(tuple(f"word{index}" for index in range(len(wild))))
    assert found.tags == expected.tags
    shown = "".join(found.texts + found.values)
    assert all(visible(text) in shown for text in (wild[1], wild[4], wild[6], wild[8], wild[9], wild[12]))


@functools.lru_cache(maxsize=4)
def _made(words):
    """The page of results in which these strings are all there is of text."""
    data = sampled(random_document(seeds=1), samples=1)
    run = data["methods"].pop("finetune")[0] | {"method": words[0], "model": words[1], "commit": words[2]}
    run["settings"] = {words[3]: words[4], "curve_shots": 1}
    run["versions"] = {words[5]: words[6]}
    run["target"]["task"] = data["methods"]["promot"][0]["target"]["task"] = words[7]
    data["methods"]["pretrained"][0]["target"]["task"] = words[7]
    for each in (run, data["methods"]["pretrained"][0], data["methods"]["promot"][0]):
        tasks = each["icl"]["1"]["tasks"]
        tasks[words[8]] = tasks.pop("capital")
        each["samples"][0] |= {"task": words[9], "input": words[10].replace("\n", " "), "target": words[11]}
    run["samples"][0]["output"] = words[12]
    run["curve"][0]["tasks"] = {words[13]: {"metric": "exact_match", "score": 1.0, "format_share": 2.0, "n": 1}}
    data["methods"][words[0]] = [run]
    return Structure(page.render({words[7]: made(data)}, [alignment(stage=words[6])]))


def test_colour_of_a_change_says_whether_it_is_better():
    data = random_document(seeds=1, methods=("pretrained", "promot"))
    for method, (target, average, share) in {"pretrained": (50, 40, 30), "promot": (60, 35, 22)}.items():
        run = data["methods"][method][0]
        run["target"] |= {"score": target, "ci95": [target - 4, target + 4]}
        for entry in run["icl"].values():
            entry |= {"norm_avg": average, "format_share": share, "ci95": [average - 2, average + 2]}
            entry["tasks"]["capital"] |= {"score": 70.0, "format_share": target}
    cells = re.findall(r'"score">([\d.]+)</span> <span class="(\w+)">(.*?)</span>', page.render({"": made(data)}))
    for cell in (("60.0", "up", "+10.0"), ("35.0", "down", "-5.0"), ("70.0", "same", "+0.0")):
        assert cell in cells
    # The format shares of one seed have no interval.
    assert ("22.0", "same", "-8.0") in cells and ("60.0", "same", "+10.0") in cells
    data["methods"]["promot"][0]["target"]["ci95"] = [53, 67]  # overlaps with [46, 54]
    text = page.render({"": made(data)})
    assert '"score">60.0</span> <span class="same">+10.0' in text
    assert '"score">60.0</span> <span class="up">+10.0' not in text


def test_less_format_share_is_better():
    data = random_document(seeds=3, methods=("pretrained", "promot"))
    for method, share in {"pretrained": 30, "promot": 22}.items():
        for run in data["methods"][method]:
            for entry in run["icl"].values():
                entry["format_share"] = share + run["seed"]
                entry["tasks"]["capital"]["format_share"] = 60 - share + run["seed"]
    cells = re.findall(r'"score">([\d.]+)</span> <span class="(\w+)">(.*?)</span>', page.render({"": made(data)}))
    assert ("23.0", "up", "-8.0") in cells and ("39.0", "down", "+8.0") in cells


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_missing_the_page_is_whole(seed):
    data = sampled(random_document(seeds=3))
    prune(data, random.Random(seed))
    results = made(data)
    Structure(page.render({"": results}))
    assert results == made(data)


@pytest.mark.parametrize("data", [{"methods": {}}, {"methods": {"promot": []}}])
def test_nothing_at_all(data):
    assert "No scores." in page.render({"": made(data)})


def test_several_tasks_and_many_methods():
    methods = (
        "pretrained",
        "finetune",
        "promot",
        "joint",
        "random_prompt",
        "promot_lora",
        *(f"m{i}" for i in range(20)),
    )
    text = page.render(
        {"rte": random_results(seeds=1, methods=methods), "en_fr": made(sampled(random_document(seeds=1)))}
    )
    assert "Fine-tuned on rte" in text and "Fine-tuned on en_fr" in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and {"task-0", "task-1", "samples", "runs"} <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_runs_at_rates_that_were_not_chosen_are_in_the_browser_of_runs_only():
    data = sampled(random_document(seeds=1))
    before = page.render({"": made(data)})
    run = {**data["methods"]["finetune"][0], "varied": {"model": 0.25, "l2sp": 0.1}}
    text = page.render({"": made(data | {"others": [run]})})
    assert text.count("model 0.25, l2sp 0.1, not chosen") == 1 and "not chosen" not in before
    assert text.count('<article class="item"') == before.count('<article class="item"') + 1


def test_right_outputs_are_marked_by_their_score():
    data = random_document(seeds=1, methods=("pretrained", "finetune", "promot"))
    same = {"task": "capital", "shots": 0, "input": "Q:\n\nwhere?", "target": "Rome | Roma", "query": 0}
    for method, more in {
        "pretrained": {"output": "roma.", "score": 100.0},
        "finetune": {"output": "Rome | Roma", "score": 0.0},
        "promot": {"output": "Rome | Roma", "score": None},  # of a metric that has none: equal or not
    }.items():
        data["methods"][method][0]["samples"] = [same | more]
    text = page.render({"": made(data)})
    assert re.findall(r'<div class="hit"><dt>(.*?)<span', text) == ["pretrained", "ProMoT"]
    assert "Q:\n\nwhere?</pre>" in text and "Exemplars" not in text


@pytest.mark.parametrize("shots", [0, 1])
def test_exemplars_stand_apart_from_the_query(shots):
    data = random_document(seeds=1, methods=("pretrained",))
    sample = {"task": "capital", "shots": shots, "input": "one A\n\nQ:\n\ntwo", "target": "B", "output": "B"}
    run = data["methods"]["pretrained"][0]
    run["samples"] = [sample | {"query": 7 * shots}]
    text = page.render({"": made(data)})
    assert ("<pre>one A</pre>" in text, "<pre>Q:\n\ntwo</pre>" in text) == (bool(shots), bool(shots))
    run["samples"] = [sample]  # older results do not say where the query begins
    text = page.render({"": made(data)})
    assert ("<pre>two</pre>" in text, "Exemplars" in text) == (bool(shots), bool(shots))


def test_cells_that_are_not_finished_are_told():
    data = random_document(seeds=1)
    data["cells"] = [
        {"method": "promot", "seed": 0, "state": "finished"},
        {"method": "l2sp", "seed": 0, "state": "failed", "message": "not finite", "varied": {"model": 0.1}},
    ]
    text = page.render({"": made(data)})
    assert "1 of 2 cells are finished" in text and "not finite" in text and "model 0.1" in text
    data["cells"][1]["state"] = "finished"
    assert "cells are finished" not in page.render({"": made(data)})


def test_analyses_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "analyses" / "x" / "results.json"
    path.parent.mkdir(parents=True)
    for content in ("{", json.dumps({"job": "export"}), "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match="does not hold a gradient alignment"):
            page.write({"": random_results(seeds=1)}, tmp_path)
    assert not (tmp_path / "report.html").exists()
