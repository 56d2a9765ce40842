"""Seconds per GB to load each format of SmolLM2-135M in float32, tokenizer included, against transformers.

The files are in the page cache. We also compute a checksum of every weight, by which prompts and runs know their model.
Time: 5 minutes on two cores; --quick --pairs 1: 1 minute.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import models
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import MEMORY, Column, Question, main
from promot_jax import assets


def cases(quick: bool) -> Sequence[Case]:
    """Hugging Face folders in float32 and bfloat16, a 4-bit GGUF file, a T5X checkpoint; a quick run is the same."""
    float32, bfloat16 = models.smollm2(), models.smollm2("bfloat16") / "stripped"
    gguf = Path(assets.resolve("asset:smollm2-135m-instruct"))
    t5x = float32 / "t5x" / "checkpoint_1"
    tokenizer = str(float32 / "stripped")
    gguf_baseline = {"folder": str(gguf.parent), "gguf_file": gguf.name}
    return [
        _case("huggingface_f32", float32 / "stripped", {}, {"folder": tokenizer}),
        _case("huggingface_bf16", bfloat16, {}, {"folder": str(bfloat16)}),
        _case("gguf_4bit", gguf, {}, gguf_baseline),
        _case("t5x", t5x, {"vocabulary": tokenizer, "gin_model": "models/smollm2_135m.gin"}, None),
    ]


def _case(name: str, path: Path, options: dict[str, str], baseline: dict[str, str] | None) -> Case:
    files = sorted(path.glob("*.safetensors")) if path.suffix != ".gguf" else [path]
    read = [str(file) for file in files or path.rglob("*") if file.is_file()]
    sides = [Side("ours", "benchmarks.ours:load", {"path": str(path), "files": read, **options})]
    ratios = [Ratio(f"loading_{name}_s_per_gb", "seconds_per_gb", "ours")]
    if baseline:
        sides.append(Side("transformers", "benchmarks.baselines:load", {"files": read, **baseline}))
        ratios.append(Ratio(f"loading_{name}_vs_transformers", "seconds", "ours", "transformers"))
    return Case(name, tuple(sides), tuple(ratios))


QUESTION = Question(
    "loading", cases, {"seconds": Column("seconds"), "seconds_per_gb": Column("seconds per GB"), **MEMORY}
)

if __name__ == "__main__":
    main(QUESTION)
