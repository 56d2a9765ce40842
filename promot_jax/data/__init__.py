"""SeqIO text examples to model batches. TensorFlow reads data only: it stays silent and off the accelerators."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Read by TensorFlow when it is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps C++ from writing to stderr: TensorFlow logs before it reads how much it may log. Exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


with _quiet():
    import seqio as seqio
    import tensorflow as tf

    # JAX owns the accelerators.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
