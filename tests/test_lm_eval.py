"""lm-eval on our models: the numbers of its own `hf` model on the exported folder, and of our evaluation."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import promot_jax as pj
from promot_jax.errors import UserError
from promot_jax.params import soft_prompts

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install promot_jax[lm-eval]")

from promot_jax import lm_eval as adapter  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # other people's programs
]
TEXTS = [f"Review: the {noun} was {word}\nLabel:" for noun in ("film", "cast", "plot") for word in ("good", "bad")]
LONG = "the film was good and the cast was bad but a plot of old songs made it all end in a joke. " * 7  # two windows
CHOICES = [" good", " bad but long"]
STOP = {"until": ["\n"], "max_gen_toks": 6}
Request = dataclasses.make_dataclass("Request", ["args"])


@pytest.fixture(name="exported", scope="module")
def _exported(tiny_folder: Path) -> Path:
    """The tiny model and a soft prompt for it, exported; `prompt/` is the prompt as a run leaves it."""
    base = pj.load(str(tiny_folder / "tiny.gguf")).base
    rows = np.float32(np.random.default_rng(0).standard_normal((3, 32)))
    pj.Model(base, {"review": rows}).export(tiny_folder / "lm_eval")
    info = soft_prompts.PromptInfo("review", 3, 1, None, "uniform", base.base)
    soft_prompts.save(tiny_folder / "lm_eval" / "prompt", rows, info)
    return tiny_folder / "lm_eval"


@pytest.fixture(name="examples", scope="module")
def _examples(exported: Path) -> list[dict[str, str]]:
    """Inputs, half of them with the model's own output as the target."""
    lm = adapter.PromotLM(str(exported / "stripped"))
    outputs = lm.generate_until([Request((text, STOP)) for text in TEXTS])
    targets = [output if i % 2 else "something else" for i, output in enumerate(outputs)]
    return [{"input": text, "target": target} for text, target in zip(TEXTS, targets, strict=True)]


def tasks(folder: Path, examples: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Tasks of lm-eval over a file of rows, one for each kind of request."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (folder / "long.jsonl").write_text(json.dumps({"text": LONG}) + "\n")

    def source(name: str) -> dict[str, Any]:
        files = {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    text = {"doc_to_text": "{{input}}", "doc_to_target": "{{target}}", **source("rows.jsonl")}
    metric = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    exact = {"metric": "exact_match", **metric}
    return [
        {"task": "choice", **text, **choice},
        {"task": "said", **text, "output_type": "generate_until", "generation_kwargs": STOP, "metric_list": [exact]},
        {"task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
         "metric_list": [{"metric": "byte_perplexity"}], **source("long.jsonl")},
    ]  # fmt: skip


def evaluated(model: str, chosen: list[dict[str, Any]], **arguments: Any) -> dict[str, list[Any]]:
    """What a model answered to each request of each task."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=chosen, device="cpu", batch_size=4, bootstrap_iters=0
    )
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    answers = {name: [row["filtered_resps"] for row in rows] for name, rows in samples.items()}
    results = [found["results"][task["task"]] for task in chosen]
    scores = [{key.partition(",")[0]: value for key, value in result.items() if "," in key} for result in results]
    return answers | {"scores": [{k: v for k, v in score.items() if "stderr" not in k} for score in scores]}


def numbers(answers: list[Any]) -> list[float]:
    """All numbers in nested answers."""
    return [n for answer in answers for n in (numbers(answer) if isinstance(answer, list | tuple) else [float(answer)])]


def test_numbers_are_those_of_hf_and_ours(exported: Path, examples: list[dict[str, str]], tmp_path: Path) -> None:
    stripped, chosen = str(exported / "stripped"), tasks(tmp_path, examples)
    ours, theirs = evaluated("promot_jax", chosen, checkpoint=stripped), evaluated("hf", chosen, pretrained=stripped)
    for name in ("choice", "text"):
        assert numbers(ours[name]) == pytest.approx(numbers(theirs[name]), rel=1e-4)
    assert ours["said"] == theirs["said"]
    assert ours["scores"] == [pytest.approx(scores, rel=1e-4) for scores in theirs["scores"]]
    # The longest output of our own evaluation follows from the training targets: 3 tokens give 6.
    rows = [(row["input"], row["target"]) for row in examples]
    task = pj.Task("lm_eval_said", train=[("x", "aXz")], validation=rows, test=rows)
    score = pj.load(stripped).evaluate(task).score
    assert score == pytest.approx(100 * ours["scores"][1]["exact_match"]) == pytest.approx(50)


def test_with_the_soft_prompt(exported: Path, examples: list[dict[str, str]], tmp_path: Path) -> None:
    """Reference: lm-eval's `hf` with PEFT's adapter."""
    stripped, chosen = str(exported / "stripped"), tasks(tmp_path, examples)[:1]
    ours = evaluated("promot_jax", chosen, checkpoint=stripped, prompt=str(exported / "prompt"))
    theirs = evaluated("hf", chosen, pretrained=stripped, peft=str(exported / "peft" / "review"))
    plain = evaluated("promot_jax", chosen, checkpoint=stripped)
    assert numbers(ours["choice"]) == pytest.approx(numbers(theirs["choice"]), rel=1e-4)
    assert numbers(ours["choice"]) != pytest.approx(numbers(plain["choice"]), rel=1e-2)


def test_long_contexts_and_settings(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A context that is too long loses its beginning; stop texts end outputs; unknown settings are refused."""
    lm = adapter.PromotLM(str(tiny_folder / "tiny.gguf"), max_length=30)
    long, short = (lm.generate_until([Request((text, {"max_gen_toks": 6}))]) for text in (LONG, LONG.strip()[-24:]))
    assert "is cut to its last 24" in caplog.text and long != [""] and isinstance(short[0], str)
    (whole,) = lm.generate_until([Request(("film", {"max_gen_toks": 6, "until": []}))])
    (cut,) = lm.generate_until([Request(("film", {"max_gen_toks": 6, "until": ["\0never", whole[2:4]]}))])
    assert cut == whole.split(whole[2:4])[0] != whole
    for settings, message in (({"max_gen_toks": 30}, "leaves no room in 30"), ({"typical_p": 1.0}, "'typical_p'")):
        with pytest.raises(UserError, match=message):
            lm.generate_until([Request(("x", settings))])
    with pytest.raises(UserError, match="export the model"):
        lm.chat_template(True)
    assert lm.chat_template() is None


def test_command(
    tiny_folder: Path,
    examples: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """lm-eval's own command, with our model known to it."""
    (tiny_folder / "said.yaml").write_text(json.dumps(tasks(tiny_folder, examples)[1]))  # JSON is YAML
    arguments = ["--model", "promot_jax", "--model_args", f"checkpoint={tiny_folder / 'tiny.gguf'}"]
    arguments += ["--tasks", "said", "--include_path", str(tiny_folder), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    adapter.main()
    assert "exact_match" in capsys.readouterr().out
