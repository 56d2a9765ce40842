"""The models that both sides read, made once under runs/bench/ with the same weights for both.

`smollm2` is the demo's model, exported by this package. `t5` has T5-small's sizes and random weights. Quick runs have a
tiny random Llama in the place of both decoders, with SmolLM2's tokenizer.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import FOLDER, ROOT, environment, run_process
from promot_jax import files

T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
T5_TINY = T5_SMALL | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
LLAMA_TINY = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def smollm2(dtype: str = "float32") -> Path:
    """The folder with the exports of SmolLM2-135M: `stripped/` (Hugging Face), and in float32 `t5x/checkpoint_1`."""
    workdir = FOLDER / f"smollm2_{dtype}"
    if not (workdir / "results.json").is_file():
        formats = ("huggingface", "t5x") if dtype == "float32" else ("huggingface",)
        job(workdir, "export.gin", EXPORT_DTYPE=dtype, **{"export.formats": formats})
    return workdir


def decoder(quick: bool) -> Path:
    """The Hugging Face folder of SmolLM2-135M, of a quick run that of a tiny random Llama with its tokenizer."""
    folder = smollm2() / "stripped"
    if not quick:
        return folder
    return _random("llama_tiny", {"kind": "Llama", "sizes": LLAMA_TINY, "tokenizer": str(folder)})


def t5(quick: bool) -> Path:
    """The Hugging Face folder of a random model of T5-small's shape; its tokenizer is "bytes"."""
    return _random("t5_tiny" if quick else "t5_small", {"kind": "T5", "sizes": T5_TINY if quick else T5_SMALL})


def _random(name: str, settings: dict[str, object]) -> Path:
    folder = FOLDER / name
    if not folder.is_dir():
        with files.replacing(folder) as made:
            run_process("benchmarks.baselines:write_random", {"folder": str(made), **settings})
    return folder


def job(workdir: Path, gin_file: str, parts: Sequence[str] = (), **settings: object) -> None:
    """Runs a job of this package with `--gin.NAME=VALUE` for every setting; `parts` are gin files given after its."""
    command = job_command(workdir, gin_file, **settings) + [f"--gin_file={part}" for part in parts]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=sys.stderr)


def job_command(workdir: Path | None, gin_file: str, **settings: object) -> list[str]:
    """The command of a job; without a workdir, who runs it adds one."""
    command = [sys.executable, "-m", "promot_jax.main", f"--gin_file={gin_file}"]
    command += [f"--workdir={workdir}"] if workdir else []
    return command + [f"--gin.{name}={value}" for name, value in settings.items()]


def training_command(**settings: object) -> list[str]:
    """The command of standard fine-tuning with the smallest evaluation at step 0 and a line for every update."""
    smallest = {
        "ICL_MIXTURE": "",
        "TRAIN_STEPS": 1000,
        "EVAL_PERIOD": 1000,
        "model/Training.log_period": 1,
        "Evaluation.curve_examples": 0,
        "Evaluation.curve_target_examples": 1,
    }
    return job_command(None, "finetune.gin", **(smallest | settings))
