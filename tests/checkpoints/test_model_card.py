"""README.md of exported folders: its code runs to our outputs, and it says where the model comes from."""

from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import readme_code
import tiny
import yaml

import promot_jax as pj
from promot_jax import files
from promot_jax.checkpoints import formats, pretrained, run_card, stage_folder
from promot_jax.checkpoints.huggingface import model_card
from promot_jax.checkpoints.huggingface.model_card import Card
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.params import soft_prompts
from promot_jax.results.schema import Run, StageRecord
from promot_jax.results.scores import Icl, Sample, Score, Target

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # `generate` gives peft some
]
TEXT = 'Say "good"\nor \\bad\\ \U0001f600:'  # what has to be written as a string of Python
CONFIG = "Experiment.seed = 3\n"


def test_code_of_every_readme_prints_our_output(tiny_folder: Path, tmp_path: Path) -> None:
    rows = np.float32(np.random.default_rng(0).standard_normal((3, 32)))
    model = pj.load(str(tiny_folder / "tiny.gguf"))
    _code_prints(pj.Model(model.base, {"review": rows}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), [("Flan-T5", tiny.PIECES + 100), ("Qwen 2.5", 259)])
def test_code_of_other_families(name: str, tokens: int, tmp_path: Path) -> None:
    rows = np.float32(np.random.default_rng(0).standard_normal((3, 32)))
    kind, options = hf_models.VARIANTS[name]
    # As many rows as the tokenizer has tokens: our decoding ends at others, transformers leaves them out of the text.
    hf_models.save(tmp_path / "source", kind, **options | {"vocab_size": tokens})
    vocabulary = str(tiny.sentencepiece_model(tmp_path / "spiece.model")) if name == "Flan-T5" else ""
    base = pretrained.load(str(tmp_path / "source"), Partitioner(), vocabulary=vocabulary)
    _code_prints(pj.Model(base, {"review": rows}), tmp_path)


def _code_prints(model: pj.Model, folder: Path) -> None:
    for name in formats.folders(("huggingface", "peft"), prompts=True):
        formats.write(folder, name, formats.Exported(model.base, model.prompts, card=Card(example=TEXT)))
    decoding = pj.Decoding(max_tokens=16, stop="")
    (plain,), (prompted,) = (one.generate([TEXT], decoding=decoding) for one in (model.strip(), model))
    assert plain != prompted
    assert readme_code.printed(folder / "stripped").strip() == plain
    assert readme_code.printed(folder / "with_prompts").strip() == prompted
    assert readme_code.printed(folder / "peft" / "review").strip() == prompted


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Path:
    """What a finished run of ProMoT leaves of records."""
    folder = tmp_path / "promot"
    common: dict[str, Any] = {"base": "b", "best_step": 1, "curve": []}
    for stage, trains in {"stage1": ["prompt"], "stage2": ["model"]}.items():
        record = StageRecord(stage=stage, trains=trains, checkpoint="asset:smollm2-135m-instruct", **common)
        stage_folder.record(folder / stage, record)
    info = soft_prompts.PromptInfo("reviews", 2, 1, None, "uniform", "b")
    soft_prompts.save(folder / "stage1" / "prompt", np.ones((2, 4), np.float32), info)
    score = Score(metric="accuracy", score=50.0, n=10)
    target = Target(task="reviews", metric="accuracy", score=93.04, ci95=(90.0, 95.0), n=200)
    sample = Sample(task="reviews", input=TEXT, target="good", output="good")
    run = Run.of(method="promot", seed=0, steps={}, target=target, samples=[sample], curve=[],
                 icl={"1": Icl.of({"a": score, "b": score})})  # fmt: skip
    files.write(run, folder / "results.json")
    (folder / "config.gin").write_text(CONFIG)
    return folder


def test_card_of_a_run(run: Path) -> None:
    """By the folder of the run or of a stage; by its prompt where the model is the base model."""
    card = run_card.card_of(str(run))
    assert card == Card(
        base_model="asset:smollm2-135m-instruct",
        license="Apache-2.0",
        method="ProMoT",
        task="reviews",
        scores=(
            ("target, accuracy, n = 200", "93.0 [90.0, 95.0]"),
            ("ICL, 1 shot, mean of 2 tasks, n = 20", "50.0"),
        ),
        config=CONFIG,
        example=TEXT,
    )
    assert run_card.card_of(str(run / "stage2")) == card
    by_prompt = run_card.card_of("asset:smollm2-135m-instruct", [str(run)])
    assert by_prompt == card
    assert run_card.card_of("org/name") == Card(base_model="org/name")


def test_what_a_card_says(run: Path, tmp_path: Path) -> None:
    card = run_card.card_of(str(run), hub="org/mine")
    text = model_card.stripped(card, "decoder", tiny.vocabulary())
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "license": "apache-2.0", "library_name": "transformers", "tags": ["promot", "prompt-tuning", "ProMoT"],
    }  # fmt: skip
    assert "- Fine-tuned task: reviews\n" in text and "| ICL, 1 shot, mean of 2 tasks, n = 20 | 50.0 |" in text
    assert 'from_pretrained("org/mine")' in text and "--gin_file=run.gin" in text
    adapter = model_card.adapter(card, "decoder", "org/mine", "A soft prompt", "peft/reviews")
    assert yaml.safe_load(adapter.split("---")[1])["base_model"] == "org/mine"
    assert 'PeftModel.from_pretrained(model, "org/mine", subfolder="peft/reviews")' in adapter
    model_card.write(tmp_path, text, card)
    assert (tmp_path / "run.gin").read_text() == CONFIG


def test_licences(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gemma\nbase_model: x\n---\n# license: none\n")
    assert run_card.card_of(str(tmp_path / "gone")).license == ""
    hf_like = tmp_path / "config.json"
    hf_like.write_text("{}")
    assert run_card.card_of(str(tmp_path)).license == "gemma"
    front = yaml.safe_load(
        model_card.stripped(Card(license="Gemma Terms of Use (x)"), "t5", tiny.vocabulary()).split("---")[1]
    )
    assert (front["license"], front["license_name"]) == ("other", "Gemma Terms of Use (x)")
