"""lm-eval on our models: the numbers of its own `hf` model on the exported folder, and of our evaluation."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import promot_jax as pj

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install promot_jax[lm-eval]")

from promot_jax import lm_eval as adapter  # noqa: E402
from promot_jax.errors import UserError  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore"),  # other people's programs
]
ROWS = [(f"Review: film {i} was {word}\nLabel:", word) for i in range(12) for word in ("good", "bad")]
EXAMPLES = [{"input": text, "target": target} for text, target in ROWS[20:]]
LONG = "the film was good and the cast was bad but a plot of old songs made it all end in a joke. " * 7  # two windows


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Tasks of lm-eval over a file of rows, one for each kind of request."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    (folder / "long.jsonl").write_text(json.dumps({"text": LONG}) + "\n")

    def source(name: str) -> dict[str, Any]:
        files = {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    text = {"doc_to_text": "{{input}}", "doc_to_target": "{{target}}", **source("rows.jsonl")}
    metric = {"aggregation": "mean", "higher_is_better": True}
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["good", "bad"], "metric_list": [{"metric": "acc"}]}
    stop = {"until": ["\n"], "max_gen_toks": 6}
    exact = {"metric": "exact_match", **metric}
    return [
        {"task": "choice", **text, **choice},
        {"task": "said", **text, "output_type": "generate_until", "generation_kwargs": stop, "metric_list": [exact]},
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
    return answers | {"scores": [found["results"][task["task"]] for task in chosen]}


def numbers(answers: list[Any]) -> list[float]:
    """All numbers in nested answers."""
    return [n for answer in answers for n in (numbers(answer) if isinstance(answer, list | tuple) else [float(answer)])]


@pytest.fixture(name="model", scope="module")
def _model(tiny_folder: Path) -> pj.Model:
    """Fine-tuned for a moment, so that it answers some rows rightly; with a soft prompt."""
    task = pj.Task("lm_eval_reviews", train=ROWS[:16], validation=ROWS[16:20], test=ROWS[20:])
    base = pj.load(str(tiny_folder / "tiny.gguf")).tune_model(task, steps=12, learning_rate=1e-2)
    prompted = base.tune_prompt(task, steps=2, learning_rate=0.3, workdir=tiny_folder / "lm_eval/stage1")
    prompted.export(tiny_folder / "lm_eval/exported")
    return prompted


def test_numbers_are_those_of_hf_and_ours(model: pj.Model, tiny_folder: Path, tmp_path: Path) -> None:
    exported = str(tiny_folder / "lm_eval/exported/stripped")
    chosen = tasks(tmp_path)
    ours, theirs = (evaluated("promot_jax", chosen, checkpoint=exported), evaluated("hf", chosen, pretrained=exported))
    for name in ("choice", "text"):
        assert numbers(ours[name]) == pytest.approx(numbers(theirs[name]), rel=1e-4)
    assert ours["said"] == theirs["said"]
    for mine, his in zip(ours["scores"], theirs["scores"], strict=True):
        assert {key: value for key, value in mine.items() if "," in key and "stderr" not in key} == pytest.approx(
            {key: value for key, value in his.items() if "," in key and "stderr" not in key}, rel=1e-4
        )
    score = model.strip().evaluate("lm_eval_reviews").score
    assert score is not None
    assert 100 * ours["scores"][1]["exact_match,none"] == pytest.approx(score)


def test_with_the_soft_prompt(model: pj.Model, tiny_folder: Path, tmp_path: Path) -> None:
    """Reference: lm-eval's `hf` with PEFT's adapter."""
    exported = tiny_folder / "lm_eval/exported"
    chosen = tasks(tmp_path)[:1]
    stage1 = str(tiny_folder / "lm_eval/stage1")
    ours = evaluated("promot_jax", chosen, checkpoint=str(exported / "stripped"), prompt=stage1)
    theirs = evaluated("hf", chosen, pretrained=str(exported / "stripped"), peft=str(exported / "peft/lm_eval_reviews"))
    plain = evaluated("promot_jax", chosen, checkpoint=str(exported / "stripped"))
    assert numbers(ours["choice"]) == pytest.approx(numbers(theirs["choice"]), rel=1e-4)
    assert numbers(ours["choice"]) != pytest.approx(numbers(plain["choice"]), rel=1e-2)


def test_long_contexts_and_settings(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A context that is too long loses its beginning; stop texts end outputs; unknown settings are refused."""
    lm = adapter.PromotLM(str(tiny_folder / "tiny.gguf"), max_length=30)
    request = dataclasses.make_dataclass("Request", ["args"])
    long, short = (lm.generate_until([request((text, {"max_gen_toks": 6}))]) for text in (LONG, LONG.strip()[-24:]))
    assert "is cut to its last 24" in caplog.text and long != [""] and isinstance(short[0], str)
    (whole,) = lm.generate_until([request(("film", {"max_gen_toks": 6, "until": []}))])
    (cut,) = lm.generate_until([request(("film", {"max_gen_toks": 6, "until": ["\0never", whole[2:4]]}))])
    assert cut == whole.split(whole[2:4])[0] != whole
    for settings, message in (({"max_gen_toks": 30}, "leaves no room in 30"), ({"typical_p": 1.0}, "'typical_p'")):
        with pytest.raises(UserError, match=message):
            lm.generate_until([request(("x", settings))])
    with pytest.raises(UserError, match="export the model"):
        lm.chat_template(True)
    assert lm.chat_template() is None


def test_command(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval's own command, with our model known to it."""
    (tiny_folder / "said.yaml").write_text(json.dumps(tasks(tiny_folder)[1]))  # JSON is YAML
    arguments = ["--model", "promot_jax", "--model_args", f"checkpoint={tiny_folder / 'tiny.gguf'}"]
    arguments += ["--tasks", "said", "--include_path", str(tiny_folder), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    adapter.main()
    assert "exact_match" in capsys.readouterr().out
