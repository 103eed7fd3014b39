"""KNOWN as predictors: the paper's network, and the linear step conditioned on the leaf."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from know_jax import trees
from know_jax.errors import UserError
from know_jax.predictors import known, known_leaf
from know_jax.predictors.base import Elementwise, Linear, Predictor
from know_jax.predictors.controls import history_free
from know_jax.predictors.parameters import (
  SHIPPED,
  load_known,
  network_of,
  parameter_shapes,
)


class _Network(Predictor):
  takes_theta = True
  network: ClassVar[str]

  def default_theta(self) -> dict[str, Any]:
    return load_known(shipped=self.network)

  @property
  def theta_name(self) -> str:
    return SHIPPED[self.network].name

  def accepts(self, network: str) -> bool:
    return network == self.network

  def check_theta(self, theta: Mapping[str, Any], kinds: set[str]) -> None:
    super().check_theta(theta, kinds)
    for kind in sorted(kinds):
      named = trees.named_leaves(theta[kind])
      result = {path: tuple(np.shape(leaf)) for path, leaf in named.items()}
      for path, shape in parameter_shapes(result).items():
        if result.get(path) != shape:
          raise UserError(
            f'theta[{kind!r}] has {path!r} of shape {result.get(path)}; expected {shape}, as '
            'load_known gives it.'
          )
    network = network_of({kind: theta[kind] for kind in kinds}) if kinds else self.network
    if not self.accepts(network):
      raise UserError(
        f'theta holds parameters of {network!r}; the predictor takes those of {self.network!r}.'
      )


@dataclasses.dataclass(frozen=True)
class Known(_Network, Elementwise):
  """The paper's network on every scalar weight, sliding over its own predictions: `known.KNOWN`.

  With parameters for weights in units of their leaf it is `KnownScaled`.
  """

  network = 'known'
  saturates = True

  def accepts(self, network: str) -> bool:
    return network in _ELEMENTWISE

  def for_theta(self, theta: Any) -> Predictor:
    return _ELEMENTWISE[network_of(theta)]()

  def stages(self, steps: int, params: Any) -> int:
    return known.history_length(params)

  def prepare(self, params: Any) -> Any:
    return known.fuse(params)

  def predict(
    self, history: jax.Array, params: Any, rate: float, steps: tuple[int, ...], *of_leaf: jax.Array
  ) -> jax.Array:
    return known.rollout(params, history, steps, *of_leaf)


@dataclasses.dataclass(frozen=True)
class KnownScaled(Known):
  """`Known` on weights in units of their leaf."""

  # Its steps end at a multiple of the leaf's own, where nothing is wrong.
  saturates = False
  needs_moments = True

  def of_leaf(self, moments: jax.Array, params: Any) -> jax.Array:
    return known.units(moments)


_ELEMENTWISE = {'known': Known, 'known_scaled': KnownScaled}


@dataclasses.dataclass(frozen=True)
class KnownLeaf(_Network, Linear):
  """One linear step for all weights of a leaf, chosen by how the leaf has moved: `known_leaf`."""

  network = 'known_leaf'
  needs_moments = True

  def stages(self, steps: int, params: Any) -> int:
    return known_leaf.history_length(params)

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> jax.Array:
    params = jax.tree.map(jnp.asarray, params)
    return known_leaf.stage_coefficients(known_leaf.rollout(params, moments, rate, steps))

  def outside(self, moments: Any, params: Any, rate: float) -> jax.Array:
    return known_leaf.outside(params, moments, rate)


PREDICTORS = {
  'known': Known,
  'known_leaf': KnownLeaf,
  'known_history_free': history_free(Known()),
  'known_leaf_history_free': history_free(KnownLeaf()),
}
