"""The checksum of arrays: sensitive to every bit and place, the same on every mesh."""

import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import python

from promot_jax.params.checksum import checksum


def reference(array: np.ndarray) -> int:
    """MurmurHash3's finalizer (Appleby, smhasher) of each element's bits and number, summed, in plain integers."""
    bits = array.astype(np.uint8) if array.dtype == bool else array
    words = bits.reshape(-1).view(f"u{bits.dtype.itemsize}").tolist()
    total = 0
    for place, word in enumerate(words):
        value = (word + place * 0x9E3779B1) % 2**32
        value = (value ^ value >> 16) * 0x85EBCA6B % 2**32
        value = (value ^ value >> 13) * 0xC2B2AE35 % 2**32
        total += value ^ value >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_it_is_what_plain_integers_say(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.asarray(jnp.asarray(np.random.default_rng(0).normal(0, 9, shape)).astype(dtype))
    assert checksum(values) == checksum(jnp.asarray(values)) == reference(values)


def test_every_bit_counts() -> None:
    values = np.random.default_rng(0).normal(0, 1, 4).astype(np.float32)
    flipped = set()
    for element in range(4):
        for bit in range(32):
            words = values.view(np.uint32).copy()
            words[element] ^= np.uint32(1 << bit)
            flipped.add(checksum(words.view(np.float32)))
    assert len(flipped) == 128 and checksum(values) not in flipped
    assert checksum(values[::-1].copy()) != checksum(values) != checksum(-values)
    assert checksum(np.float32([0.0])) != checksum(np.float32([-0.0]))


def test_a_value_in_a_wider_type_has_the_checksum_of_its_own() -> None:
    narrow = jax.random.normal(jax.random.key(0), (6, 3), jnp.bfloat16)
    assert checksum(narrow.astype(jnp.float32), narrow.dtype) == checksum(narrow)


def test_it_is_the_same_on_every_mesh() -> None:
    said = python(
        """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from promot_jax.params.checksum import checksum
values = np.arange(96, dtype=np.float32).reshape(8, 12)
mesh = jax.make_mesh((4, 2), ("a", "b"))
specs = (P(), P("a"), P("b", "a"), P(None, ("a", "b")[1]))
print({checksum(jax.device_put(values, NamedSharding(mesh, spec))) for spec in specs} == {checksum(values)})
""",
        XLA_FLAGS=compilation.flags("--xla_force_host_platform_device_count=8"),
    )
    assert said == "True\n"
