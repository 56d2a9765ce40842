"""Job `export`: a run's model in the formats of other programs, with its soft prompts and LoRA."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promot_jax import files, trees
from promot_jax.distributed import hosts
from promot_jax.errors import UserError
from promot_jax.experiments.initial_params import load_prompts
from promot_jax.experiments.resume_guard import keep_settings
from promot_jax.experiments.session import load_base
from promot_jax.experiments.settings import Experiment
from promot_jax.params.fingerprint import fingerprint
from promot_jax.results import records
from promot_jax.results.provenance import commit, versions


def export(
    workdir: Path,
    experiment: Experiment,
    dtype: str = "float32",
    formats: Sequence[str] = ("huggingface", "peft"),
    push_to_hub: str = "",
) -> None:
    """Job: writes a model in the formats of others: stripped, with its prompts as tokens, and as adapters for PEFT.

    Args:
        workdir: gets `stripped/` and, with prompts, `with_prompts/` (Hugging Face folders); `peft/`, an adapter for
            each prompt and for the run's LoRA, and `base/` where PEFT needs it for that; `t5x/checkpoint_1`. None of
            them may be there already; those of the same export that was killed are kept.
        experiment: model and prompts (`prompt_path`).
        dtype: of the Hugging Face folders, "float32" or "bfloat16"; other files are float32.
        formats: which to write, of "huggingface", "peft" and "t5x".
        push_to_hub: repository on the Hugging Face hub, "org/name", that all but T5X's is uploaded to; "" for none.

    Raises:
        UserError: an unknown format, a folder that is there already, or a model that a format cannot hold.
    """
    from promot_jax.checkpoints import formats as written
    from promot_jax.checkpoints import run_card, trained_lora
    from promot_jax.checkpoints.huggingface import hub

    started = time.monotonic()
    if hosts.count() > 1:
        raise UserError("An export runs on one host, which holds the whole model in memory: start it there alone.")
    if push_to_hub:
        hub.check(push_to_hub)
    given = experiment.prompt_path
    paths = [given] if isinstance(given, str) else [*given.values()]
    lora = trained_lora.find(experiment.checkpoint)
    names = written.folders(formats, prompts=any(paths), lora=lora, hub=push_to_hub)
    killed = _was_killed(workdir)
    for name in names:  # before the model is read
        if (workdir / name).exists() and not killed:
            raise UserError(f"{workdir / name} exists already; delete it, or give another --workdir.")
    base = load_base(experiment)
    prompts = load_prompts(experiment, base) if any(paths) else {}
    settings = {"export": {"model": base.fingerprint, "prompts": fingerprint(prompts), "dtype": dtype}}
    if any((workdir / name).exists() for name in names):
        keep_settings(workdir, settings)
    else:
        (workdir / "results.json").unlink(missing_ok=True)
        files.write(settings, workdir / "settings.json")
    card = run_card.card_of(experiment.checkpoint, list(filter(None, paths)), push_to_hub)
    of_lora = partial(load_base, dataclasses.replace(experiment, checkpoint=lora.checkpoint)) if lora else None
    exported = written.Exported(base, prompts, lora, of_lora, dtype, card)
    for name in names:
        if (workdir / name).exists():
            print(f"{workdir / name} is complete.", flush=True)
            continue
        print(f"{written.write(workdir, name, exported)}: {trees.count(base.params):,} parameters.", flush=True)
    summary: dict[str, Any] = {"job": "export", "model": experiment.checkpoint, "base": base.base, "dtype": dtype}
    if push_to_hub:
        root = written.STRIPPED if written.STRIPPED in names else ""
        rest = [name for name in names if name not in (root, written.T5X)]
        summary["hub"] = hub.push(workdir, push_to_hub, root, rest)
        print(f"Pushed to {summary['hub']}.", flush=True)
    summary |= {"fingerprint": base.fingerprint, "prompts": {name: len(rows) for name, rows in prompts.items()}}
    summary |= {"seconds": time.monotonic() - started, "versions": versions(), "commit": commit()}
    files.write(summary, workdir / "results.json")


def _was_killed(workdir: Path) -> bool:
    """Whether an export was begun in a folder and not finished; raises UserError where another job ran there."""
    for path in (workdir / "settings.json", workdir / "results.json"):
        if path.is_file():
            found = records.read(path, dict[str, Any], "give another --workdir")
            if found.get("job") != "export" and "export" not in found:
                raise UserError(f"{workdir} holds the {path.name} of another run; give another --workdir.")
    return (workdir / "settings.json").is_file() and not (workdir / "results.json").is_file()
