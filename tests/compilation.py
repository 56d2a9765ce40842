"""How the suite compiles: fast, and each program once. Models are so small that compiling takes longer than running.

`JAX_DISABLE_MOST_OPTIMIZATIONS=false XLA_FLAGS= make test` compiles as users do.
"""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# XLA's older code generator for fusions compiles in half the time of today's. A jaxlib that does not know a flag
# ends the process, so it is set only where it was tried.
_FLAG = "--xla_cpu_use_fusion_emitters=false"
_HAS_FLAG = ("0.10.",)
# Environment variables of a process that compiles as a user's does.
AS_USERS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}


def flags(*more: str) -> str:
    """Returns `XLA_FLAGS` for a process that wants flags of its own."""
    known = metadata.version("jaxlib").startswith(_HAS_FLAG)
    return " ".join([*([_FLAG] if known else []), *more])


def environment() -> dict[str, str]:
    """Returns JAX's environment variables for a session, less those that are set: the first process sets them for all.

    The folder of compiled programs ends with the process that made it.
    """
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": flags(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="promot_jax_compiled_")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        settings["JAX_COMPILATION_CACHE_DIR"] = cache
    return {name: value for name, value in settings.items() if name not in os.environ}
