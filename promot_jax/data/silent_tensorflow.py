"""Imports TensorFlow and SeqIO, silent and without the accelerators: they only read data, and JAX owns the devices.

Modules that read data import this one before `seqio`. It takes seconds, so no module of settings may import it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# TensorFlow reads these when it is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


@contextmanager
def _quiet() -> Iterator[None]:
    """Closes stderr to C++, since TensorFlow logs before it reads its log level. Exceptions pass."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


with _quiet():
    import seqio  # noqa: F401
    import tensorflow as tf

    # JAX owns the accelerators.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
