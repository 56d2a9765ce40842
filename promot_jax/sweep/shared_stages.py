"""A first stage that several cells share is trained once and linked into the others."""

import os
import shutil
from pathlib import Path

from promot_jax import files
from promot_jax.checkpoints import stage_folder


def share_stage(donor: Path, folder: Path, stage: str) -> None:
    """Gives a run the finished stage of another run, so that it is not trained twice; nothing where there is none.

    Files are linked where the file system can: a finished stage is not written to any more. Whether the stage is the
    right one is checked by whoever takes it up (`experiments.stage.run_stage`), as for every finished stage.
    """
    source, target = donor / stage, folder / stage
    if target.exists() or not stage_folder.describe(source):
        return
    for left in target.parent.glob(f".{target.name}.*"):  # by a kill
        shutil.rmtree(left)
    with files.replacing(target) as made:
        shutil.copytree(source, made, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links here
        shutil.copy2(source, target)
