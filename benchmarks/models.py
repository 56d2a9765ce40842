"""The models that both sides read, made once under runs/bench/ with the same weights for both.

`smollm2` is the demo's model, exported by this package. `t5` has T5-small's sizes and random weights.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import FOLDER, ROOT, environment, run_process
from promot_jax import files

T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


def smollm2(dtype: str = "float32") -> Path:
    """The folder with the exports of SmolLM2-135M: `stripped/` (Hugging Face), and in float32 `t5x/checkpoint_0`."""
    workdir = FOLDER / f"smollm2_{dtype}"
    if not (workdir / "results.json").is_file():
        formats = ("huggingface", "t5x") if dtype == "float32" else ("huggingface",)
        job(workdir, "export.gin", EXPORT_DTYPE=dtype, **{"export.formats": formats})
    return workdir


def t5() -> Path:
    """The Hugging Face folder of a random model of T5-small's shape; its tokenizer is "bytes"."""
    folder = FOLDER / "t5_small"
    if not folder.is_dir():
        with files.replacing(folder) as made:
            run_process("benchmarks.rivals:write_t5", {"folder": str(made), "sizes": T5_SMALL})
    return folder


def job(workdir: Path, gin_file: str, parts: Sequence[str] = (), **settings: object) -> None:
    """Runs a job of this package with `--gin.NAME=VALUE` for every setting; `parts` are gin files given after its."""
    command = job_command(workdir, gin_file, **settings)
    subprocess.run(
        [*command, *(f"--gin_file={part}" for part in parts)],
        cwd=ROOT,
        env=environment(),
        check=True,
        stdout=sys.stderr,
    )


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
