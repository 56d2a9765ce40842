"""Compiles programs that are one long forward pass, with the CPU library that is fastest at it."""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from promot_jax.distributed import cpu

Result = TypeVar("Result")

OPTION = "xla_cpu_experimental_ynn_fusion_type"  # which parts of a program XLA leaves to YNNPACK
WITHOUT_YNNPACK = {OPTION: ""}  # none, so that Eigen multiplies matrices


def jit_forward(function: Callable[..., Result], **options: Any) -> Callable[..., Result]:
    """Is `jax.jit` for a forward pass over many tokens: a prefill, likelihoods, a loss without its gradient.

    On an x86 CPU with AVX2 and without AVX-512 XLA's default, YNNPACK, takes some 1.4 times as long for products of
    thousands of rows as Eigen does (docs/performance.md). It is faster at those of a decoding step, and as fast or
    faster in an update, which therefore keep it. So do CPUs with AVX-512, where this has not been measured. Who has
    set XLA's option in `XLA_FLAGS` keeps it for all programs.

    Args:
        function: to be compiled when it is first called.
        **options: of `jax.jit`.
    """

    @functools.cache
    def program() -> Any:
        return jax.jit(function, compiler_options=_compiler_options(), **options)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Result:
        result: Result = program()(*args, **keywords)
        return result

    return call


@functools.cache
def _compiler_options() -> dict[str, str]:
    flags = cpu.field("flags").split()
    if OPTION in os.environ.get("XLA_FLAGS", ""):
        return {}
    if jax.default_backend() != "cpu" or "avx2" not in flags or "avx512f" in flags:
        return {}
    try:  # the option is experimental: another version of XLA may not have it
        jax.jit(lambda x: x, compiler_options=WITHOUT_YNNPACK).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return WITHOUT_YNNPACK
