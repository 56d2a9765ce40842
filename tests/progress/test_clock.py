"""The clock that stands still while JAX compiles."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from promot_jax.progress import clock as module
from promot_jax.progress.clock import clock, duration


def test_it_stands_still_while_a_program_is_compiled() -> None:
    """Tracing takes the time here: it is made to, within a function that another one calls."""

    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        time.sleep(0.3)  # while it is traced
        return x + 1

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        return inner(x) * 2

    x = jnp.zeros(3)
    before, started = clock(), time.monotonic()
    outer(x).block_until_ready()
    compiled = time.monotonic() - started
    assert compiled > 0.3 and 0 <= clock() - before < compiled - 0.3 + 0.05

    before = clock()
    time.sleep(0.2)
    outer(x).block_until_ready()
    assert clock() - before >= 0.2


def test_a_span_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", module._Compiled())
    module._note("/jax/core/compile/jaxpr_trace_duration", 10.0, 11.0)
    module._note("/jax/core/compile/jaxpr_trace_duration", 12.0, 14.0)
    module._note("/jax/core/compile/jaxpr_trace_duration", 11.5, 15.0)
    module._note("/jax/other", 0.0, 99.0)
    assert module._compiled.seconds == 4.5


def test_what_another_thread_compiles_does_not_count() -> None:
    clock()
    before = module._compiled.seconds
    thread = threading.Thread(target=module._note, args=("/jax/core/compile/x", 1e12, 1e12 + 5))
    thread.start()
    thread.join()
    assert module._compiled.seconds == before


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3599.7, 7860)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 11 min",
    ]
