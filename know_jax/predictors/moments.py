"""The differences of a history, its newest stage, and their second moments over a leaf."""

import jax
import jax.numpy as jnp
import numpy as np


def basis(history: jax.Array) -> jax.Array:
  """The differences of a history and its newest weights: `[S, ...]` -> `[S, ...]`."""
  return jnp.concatenate([jnp.diff(history, axis=0), history[-1:]])


def host_basis(history: np.ndarray) -> np.ndarray:
  """`basis` of NumPy arrays, in their own precision."""
  return np.concatenate([np.diff(history, axis=0), history[-1:]])


def second_moments(history: jax.Array) -> jax.Array:
  """G, summed, not yet divided by their number, over weights `[S, N]`: `[S, S]`."""
  v = basis(history)
  return jnp.dot(v, v.T, precision=jax.lax.Precision.HIGHEST)
