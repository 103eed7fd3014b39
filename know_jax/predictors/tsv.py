"""Task singular vectors: the main directions of a leaf's movement."""

import dataclasses
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
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    low = jnp.matmul(u[:, :rank] * s[:rank], vt[:rank], precision=jax.lax.Precision.HIGHEST)
    return history[-1] + low.reshape(tau.shape)


PREDICTORS = {'tsv': TSV}
