"""One seed decides all randomness: keys by name."""

import zlib

import jax


def named_key(seed: int | jax.Array, *names: str | int) -> jax.Array:
  """The random key for one purpose of a run, from its seed or key: the same on every machine."""
  key = jax.random.key(seed) if isinstance(seed, int) else seed
  for name in names:
    key = jax.random.fold_in(key, zlib.crc32(str(name).encode()))
  return key
