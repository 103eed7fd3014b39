"""Task singular vectors: the main directions of a leaf's movement."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from know_jax.predictors.base import Leaf, WholeLeaf

_OUTPUTS_FIRST, _OUT = 'weight', 'out/kernel'
"""Paths of leaves that are other matrices than the rest."""


@dataclasses.dataclass(frozen=True)
class TSV(WholeLeaf):
  """Theta^0 + the best rank-k approximation of tau_n, an m x n matrix, k = max(1, min(m, n) // 10).

  A convolution's HWIO is read as (HWI, O), attention's query, key and value kernels (D, H, K) as
  (D, HK), its output kernel (H, K, D) as (HK, D), and PyTorch's `weight`, which has the outputs
  first, as (O, IHW); other leaves take the whole tau_n.

  References:
    Gargiulo et al., "Task singular vectors", CVPR 2025.
  """

  def stages(self, steps: int, params: Any) -> int:
    return steps + 1

  def is_whole(self, leaf: Leaf, shape: tuple[int, ...]) -> bool:
    return leaf.kind != 'bias' and len(shape) > 1

  def alike(self, leaf: Leaf) -> Leaf:
    keys = leaf.path.removesuffix('/value').split('/')
    usual = _OUT if keys[-2:-1] == ['out'] else 'kernel'
    return Leaf(_OUTPUTS_FIRST if keys[-1] == _OUTPUTS_FIRST else usual, leaf.kind)

  def predict(
    self, history: Sequence[jax.Array], leaf: Leaf, params: Any, rate: float, steps: int
  ) -> jax.Array:
    tau = history[-1] - history[-1 - steps]
    if not self.is_whole(leaf, tau.shape) or not tau.size:
      return history[-1] + tau
    path = self.alike(leaf).path
    outputs_first = path == _OUTPUTS_FIRST
    inputs_first = leaf.kind == 'fc' and path != _OUT
    in_axes = 1 if outputs_first or inputs_first else tau.ndim - 1
    matrix = tau.reshape(math.prod(tau.shape[:in_axes]), -1)
    rank = max(1, min(matrix.shape) // 10)
    return history[-1] + _truncated(matrix, rank).reshape(tau.shape)


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncated(matrix: jax.Array, rank: int) -> jax.Array:
  """The best approximation of a matrix by one of this rank."""
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  return _product(u, s, vt, rank)


def _product(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> jax.Array:
  return _dot(u[:, :rank] * s[:rank], vt[:rank])


@_truncated.defjvp
def _truncated_jvp(rank: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  """That of the singular vectors would be NaN wherever two singular values are equal.

  Only gaps between kept and dropped ones matter, as in Feppon and Lermusiaux, "A geometric approach
  to dynamical model order reduction", SIAM J. Matrix Anal. Appl. 2018. Where there is none the
  approximation is not differentiable; then what would turn kept directions to dropped ones is left
  out.
  """
  (matrix,), (tangent,) = primals, tangents
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  kept = jnp.arange(s.size) < rank
  within = _dot(_dot(u.T, tangent), vt.T)
  gap = s[:, None] ** 2 - s[None, :] ** 2
  turns = kept[:, None] & ~kept[None, :] & (gap > 0)
  gap = jnp.where(turns, gap, 1.0)
  own, other = s[:, None] ** 2 / gap, s[:, None] * s[None, :] / gap
  to_right = jnp.where(turns, own * within + other * within.T, 0.0)
  to_left = jnp.where(turns, own * within.T + other * within, 0.0)
  inner = jnp.where(kept[:, None] & kept[None, :], within, 0.0) + to_right + to_left.T
  # And to directions that are none of the singular vectors.
  below = _dot(tangent - _dot(u, _dot(u.T, tangent)), _dot(vt[:rank].T, vt[:rank]))
  beside = _dot(_dot(u[:, :rank], u[:, :rank].T), tangent - _dot(_dot(tangent, vt.T), vt))
  return _product(u, s, vt, rank), _dot(_dot(u, inner), vt) + below + beside


PREDICTORS = {'tsv': TSV}
