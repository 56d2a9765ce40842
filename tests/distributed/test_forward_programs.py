"""Programs of one long forward pass: which compiler options they get, and that results stay what they are."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax.distributed import cpu, forward_programs
from promot_jax.distributed.forward_programs import WITHOUT_YNNPACK, jit_forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The options are chosen once per process: here, once per test."""
    forward_programs._compiler_options.cache_clear()
    yield
    forward_programs._compiler_options.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse2 avx2 fma", WITHOUT_YNNPACK), ("avx2 avx512f", {}), ("sse2", {}), ("", {})],
    ids=["AVX2", "AVX-512", "neither", "no Linux, or no x86"],
)
def test_the_library_goes_by_the_cpu(flags: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "field", lambda name: flags)
    assert forward_programs._compiler_options() == expected


def test_who_has_chosen_the_library_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "field", lambda name: "avx2")
    monkeypatch.setenv("XLA_FLAGS", f"--{forward_programs.OPTION}=LIBRARY_FUSION_TYPE_DOT")
    assert forward_programs._compiler_options() == {}


def test_a_version_of_xla_without_the_option_runs_by_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "field", lambda name: "avx2")
    monkeypatch.setattr(forward_programs, "WITHOUT_YNNPACK", {"xla_cpu_of_another_version": ""})
    assert forward_programs._compiler_options() == {}


def test_products_are_computed_without_ynnpack_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "field", lambda name: "avx2")
    left, right = (jax.random.normal(jax.random.key(i), (256, 256)) for i in range(2))

    def product(left: jax.Array, right: jax.Array, *, power: int) -> jax.Array:
        return jnp.tanh(left @ right) ** power

    found = jit_forward(product, static_argnames="power")(left, right, power=2)
    np.testing.assert_allclose(found, product(left, right, power=2), rtol=1e-4, atol=1e-5)

    def library(options: dict[str, str]) -> bool:
        program = jax.jit(product, static_argnames="power", compiler_options=options)
        return "ynn_fusion" in program.lower(left, right, power=2).compile().as_text()

    assert library({}) and not library(forward_programs._compiler_options())
