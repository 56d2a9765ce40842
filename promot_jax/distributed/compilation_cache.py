"""The persistent compilation cache: programs that an earlier run has compiled are read from disk.

JAX's own cache does the work; here it gets a folder, `~/.cache/promot_jax/compiled`, or that of
`PROMOT_COMPILATION_CACHE`, which may also be "off". Who has set JAX's cache (`JAX_COMPILATION_CACHE_DIR`) keeps it.
"""

import hashlib
import os
import platform
import sys
import time
from pathlib import Path

from promot_jax.distributed import cpu

VARIABLE = "PROMOT_COMPILATION_CACHE"
LEAST_SECONDS = 0.2  # programs that compile faster are not kept
HALF_WRITTEN_SECONDS = 600  # after which a program without its time is not being written any more
MOST_BYTES = 4 * 2**30  # beyond, the programs that were not used for longest are deleted


def use() -> None:
    """Turns the cache on for this process, unless it is off; before the first program is compiled.

    A folder that cannot be written is named on stderr, and the run goes on without it.
    """
    import jax

    setting = os.environ.get(VARIABLE, "")
    if setting == "off" or (not setting and jax.config.values["jax_compilation_cache_dir"]):
        return
    folder = Path(os.path.expanduser(setting or "~/.cache/promot_jax/compiled")) / _machine()
    is_here = "://" not in setting and folder.parts[0][0] != "~"  # of a user who is not known here
    if not (is_here and _made(folder)):
        print(f"Programs are compiled anew: {folder} cannot be written. Set {VARIABLE}.", file=sys.stderr, flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _made(folder: Path) -> bool:
    """Makes a folder unless it is there; says whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_half_written(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _delete_half_written(folder: Path) -> None:
    """Deletes programs of killed runs: JAX writes a program, then its time, and needs both of every program there."""
    for program in folder.glob("*-cache"):
        times = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not times.exists() and time.time() - program.stat().st_mtime > HALF_WRITTEN_SECONDS:
            program.unlink(missing_ok=True)


def _machine() -> str:
    """A name of this kind of CPU: programs compiled for one do not run on every other that shares the folder."""
    described = [line for line in dict.fromkeys(cpu.lines()) if line.startswith(("model name", "flags", "Features"))]
    text = "\n".join([platform.machine(), *described])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
