"""What a benchmark ran on: CPU, memory, versions, commit."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

from promot_jax.distributed import cpu
from promot_jax.results import provenance

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that matter for matrix products
BFLOAT16 = ("avx512_bf16", "amx_bf16")  # with one of them, bfloat16 products are faster than float32's
PACKAGES = ("jaxlib", "torch", "transformers", "peft", "lm_eval")


def describe() -> dict[str, Any]:
    """CPU model, flags that matter, cores, memory, versions of packages, commit and date."""
    versions = provenance.versions()
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu.field("model name") or platform.processor(),
        "flags": flags(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],  # of the last minute, before the benchmark: a quiet machine is near 0
        "versions": versions,
        "commit": provenance.commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def flags() -> list[str]:
    """Those of `FLAGS` that the CPU has."""
    has = cpu.field("flags").split()
    return [flag for flag in FLAGS if flag in has]


def fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32."""
    return any(flag in BFLOAT16 for flag in flags())
