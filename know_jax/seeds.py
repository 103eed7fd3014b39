"""One seed decides all randomness: keys by name."""

import zlib

import jax

from know_jax.errors import UserError


def named_key(seed: int | jax.Array, *names: str | int) -> jax.Array:
  """The random key for one purpose of a run, from its seed or key: the same on every machine."""
  if isinstance(seed, int):
    if not -(2**31) <= seed < 2**32:
      raise UserError(f'seed is {seed}; expected one of 32 bits: JAX takes no more of them.')
    seed = jax.random.key(seed)
  key = seed
  for name in names:
    key = jax.random.fold_in(key, zlib.crc32(str(name).encode()))
  return key
