"""SeqIO's caches: rows as a task makes them, prepared once and written to files, so that no run prepares them again.

`launch/cache_tasks.sh` writes them, `data/examples.py` reads tasks from them, and docs/pods.md says when they pay.
"""

import json
import os
from collections.abc import Sequence

import promot_jax.data.silent_tensorflow  # noqa: F401, before seqio

# isort: split
import seqio
import tensorflow as tf

from promot_jax.errors import UserError


def use(folders: Sequence[str], tasks: Sequence[seqio.Task | seqio.Mixture]) -> None:
    """Reads tasks from caches from now on, in these folders only.

    A cached task yields the same examples. `read` and `pool` of `examples` return them in the same order; the order of
    `stream` also depends on the cache's files.

    Args:
      folders: written by `launch/cache_tasks.sh` (SeqIO's own `seqio_cache_tasks`), local or gs://; the first one wins.
      tasks: the tasks that the run reads. A folder that holds none of them is a UserError.
    """
    seqio.set_global_cache_dirs(folders)
    cache_dirs = [str(task.cache_dir) for task in tasks if used(task)]
    for folder in folders:
        if not any(cache.startswith(os.path.join(folder, "")) for cache in cache_dirs):
            raise UserError(
                f"SEQIO_CACHE_DIRS names {folder}, where no task of this run has a finished cache "
                f"({', '.join(dict.fromkeys(task.name for task in tasks))}): build it with launch/cache_tasks.sh, or "
                "leave it out"
            )


def used(task: seqio.Task) -> bool:
    """Says whether a task is read from a cache; a k-shot task is read from the cache of its base task."""
    # A task keeps the cache folder that SeqIO once found, even after the list of folders was emptied.
    return bool(seqio.get_global_cache_dirs()) and task.supports_caching and task.cache_dir is not None


def check_files(folder: str, split: str) -> None:
    """Raises ValueError if the cache of a task lacks files of a split, which SeqIO would not notice."""
    with tf.io.gfile.GFile(seqio.get_cached_info_path(folder, split)) as file:
        shards = json.load(file)["num_shards"]
    files = len(tf.io.gfile.glob(f"{seqio.get_cached_tfrecord_prefix(folder, split)}-*-of-{shards:05d}"))
    if files != shards:
        raise ValueError(f"{files} of {shards} files of the split {split!r} are there")
