"""Job `export`: a run's model for T5X and for Hugging Face, plain and with its soft prompts as added tokens."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.distributed import hosts
from promot_jax.errors import UserError, nearest
from promot_jax.experiments.initial_params import load_prompts
from promot_jax.experiments.resume_guard import keep_settings
from promot_jax.experiments.session import load_base
from promot_jax.experiments.settings import Experiment
from promot_jax.params.fingerprint import fingerprint
from promot_jax.results.provenance import commit, versions


def export(
    workdir: Path, experiment: Experiment, dtype: str = "float32", formats: Sequence[str] = ("huggingface", "t5x")
) -> None:
    """Job: writes a model in the formats of others: stripped, and with its prompts as tokens where there are any.

    Args:
        workdir: gets `stripped/` and, with prompts, `with_prompts/` (Hugging Face folders), and `t5x/checkpoint_0`;
            none of them may be there already; those of the same export that was killed are kept.
        experiment: model and prompts (`prompt_path`).
        dtype: of the Hugging Face folders, "float32" or "bfloat16"; T5X checkpoints are float32.
        formats: which to write, of "huggingface" and "t5x".

    Raises:
        UserError: an unknown format, a folder that is there already, or a model that a format cannot hold.
    """
    from promot_jax.checkpoints import export as folders
    from promot_jax.checkpoints.t5x import write

    started = time.monotonic()
    for name in formats:
        if name not in ("huggingface", "t5x"):
            raise UserError(f"Unknown export format {name!r}{nearest(name, ('huggingface', 't5x'))}.")
    if hosts.count() > 1:
        raise UserError("An export runs on one host, which holds the whole model in memory: start it there alone.")
    wanted = {"stripped": "huggingface", "with_prompts": "huggingface", "t5x/checkpoint_0": "t5x"}
    targets = [workdir / name for name, kind in wanted.items() if kind in formats]
    targets = [target for target in targets if experiment.prompt_path or target.name != "with_prompts"]
    killed = (workdir / "settings.json").is_file() and not (workdir / "results.json").is_file()
    for target in targets:  # before the model is read
        if target.exists() and not killed:
            raise UserError(f"{target} exists already; delete it, or give another --workdir.")
    base = load_base(experiment)
    prompts = load_prompts(experiment, base) if experiment.prompt_path else {}
    settings = {"export": {"model": base.fingerprint, "prompts": fingerprint(prompts), "dtype": dtype}}
    if any(target.exists() for target in targets):
        keep_settings(workdir, settings)
    else:
        (workdir / "results.json").unlink(missing_ok=True)
        files.write(settings, workdir / "settings.json")
    for target in targets:
        if target.exists():
            print(f"{target} is complete.", flush=True)
            continue
        if target.name == "checkpoint_0":
            write.write(target.parent, 0, base.params)
        else:
            folders.write(target, base, prompts if target.name == "with_prompts" else None, dtype)
        print(f"{target}: {trees.count(base.params):,} parameters.", flush=True)
    summary: dict[str, Any] = {"job": "export", "model": experiment.checkpoint, "base": base.base, "dtype": dtype}
    summary |= {"fingerprint": base.fingerprint, "prompts": {name: len(rows) for name, rows in prompts.items()}}
    summary |= {"seconds": time.monotonic() - started, "versions": versions(), "commit": commit()}
    files.write(summary, workdir / "results.json")
