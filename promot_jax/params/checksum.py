"""Checksums of arrays, computed where they lie: whether a checkpoint gives back the bits that were saved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(leaf: Any, dtype: Any = None) -> int:
    """Returns a 32-bit checksum over the bits of an array and their places, the same on any mesh.

    Every device reads its part once, nothing is gathered but the sum; all hosts call this together. One changed element
    always changes the checksum, since the mixing of each is one to one; other damage goes unseen once in 2**32.

    Args:
        leaf: an array of elements of at most 4 bytes.
        dtype: in which it was saved, if `leaf` holds the same values in a wider one.
    """
    return int(_checksum(jnp.asarray(leaf), np.dtype(dtype or leaf.dtype).name))


@jax.jit(static_argnums=1)
def _checksum(leaf: jax.Array, dtype: str) -> jax.Array:
    leaf = leaf.astype(jnp.uint8 if dtype == "bool" else dtype)
    value = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):  # the element's number, modulo 2**32, without a reshape across devices
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        value += place * jnp.uint32(stride * 0x9E3779B1 % 2**32)
        stride *= leaf.shape[axis]
    # The finalizer of MurmurHash3: https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp
    value = (value ^ value >> 16) * jnp.uint32(0x85EBCA6B)
    value = (value ^ value >> 13) * jnp.uint32(0xC2B2AE35)
    return (value ^ value >> 16).sum(dtype=jnp.uint32)
