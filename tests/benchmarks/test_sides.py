"""Both sides of a training step compute the same loss on the same weights, rows and prompt."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import baselines, ours, products

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's old name
]
LLAMA = {
    "vocab_size": 5100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 5100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
STAGES = {"stage1": 4, "stage2": 4, "finetune": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, sizes in (("Llama", LLAMA), ("T5", T5)):
        made[kind] = tmp_path_factory.mktemp(kind)
        baselines.write_random(str(made[kind]), kind, sizes)
    return made


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_same_loss(folders: dict[str, Path], kind: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_all_cores", lambda: None)
    shape: dict[str, Any] = {"rows": 2, "prompt": STAGES[stage], "inputs": 7, "targets": 3, "steps": 1}
    folder = str(folders[kind])
    mine = ours.train_step(folder, stage, **shape, vocabulary="bytes")
    theirs = baselines.train_step(folder, stage, **shape)
    assert mine["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    if kind == "Llama":
        by_hand = baselines.train_step(folder, stage, **shape, target_logits=True)
        assert mine["first_loss"] == pytest.approx(by_hand["first_loss"], rel=1e-4)
    assert {*mine} == {*theirs} == {"seconds", "first_loss", "peak_bytes", "growth_bytes"}


@pytest.mark.parametrize(("stage", "factor"), [("stage1", 4), ("finetune", 6)])
def test_products_are_those_of_the_model(folders: dict[str, Path], stage: str, factor: int) -> None:
    """Two FLOPs per weight and token forward, as many for the gradient of inputs and, where they move, of weights."""
    width, mlp, keys = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["hidden_size"] // 2
    layer = 2 * width * (width + keys) + 3 * width * mlp
    shape = {"rows": 2, "prompt": 4, "inputs": 7, "targets": 3, "steps": 1}
    found = products.measure(str(folders["Llama"]), stage, **shape, vocabulary="bytes")
    flops = factor * (28 * LLAMA["num_hidden_layers"] * layer + 6 * LLAMA["vocab_size"] * width)
    assert found["seconds"] * found["gflops_per_s"] * 1e9 == pytest.approx(flops)
