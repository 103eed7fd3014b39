"""KNOWN conditioned on the leaf: a linear step whose coefficients depend on the leaf's trajectory.

Where the paper's KNOWN (`known.py`) sees one scalar weight and nothing else, this one sees how the
weight's whole leaf has moved, and takes the same step for every weight of the leaf:

  v = (d_0, ..., d_(S-2), theta^0)       differences of the history, oldest first, newest weight
  G = mean over the leaf of v v^T        [S, S], the leaf's moments
  c = context(G, r)                      what of them does not change with the scale of the weights
  a_0, ..., a_(S-2), b = MLP(c)          16 -> 32 -> 32 -> 5 for S = 5, tanh
  theta^-1 = theta^0 + sum_k a_k d_k + (b s / q - decay) theta^0

s and q are the root mean squares of the differences and of theta^0. Scaling all weights scales the
prediction, and a leaf that never moved (and decay = 0) stays where it is. As the step is linear in
v, the moments of the slid window follow from G: any number of steps costs one linear combination of
the stages, with coefficients found for the leaf as a whole.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax import trees
from know_jax.kinds import KINDS
from know_jax.predictors.known import HISTORY_LENGTH
from know_jax.predictors.moments import basis, host_basis, second_moments

__all__ = ['basis', 'host_basis', 'second_moments']

_WIDTH = 32
_PRECISION = jax.lax.Precision.HIGHEST
FARTHEST = 4.0
"""Standard deviations of the meta-dataset from its mean: a context beyond is outside of it.

There, 2 % of the leaves of convolutions and biases, and 0.2 % of dense kernels, are.
"""
# Logarithms of moments are clipped here: a stage that hardly moved has no finite one.
_LOG_LEAST = -12.0


class ConditionedKNOWN(nn.Module):
  """The network that gives a leaf's coefficients, for a history of S stages.

  1,798 parameters for S = 5; 32 of them are constants of the meta-dataset.

  Attributes:
    history_length: S.
  """

  history_length: int = HISTORY_LENGTH

  @nn.compact
  def __call__(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps a leaf's context to the coefficients of its step.

    Args:
      context: `[context_size(S)]`, see `context`.

    Returns:
      `[S]`, a_0 .. a_(S-2) and b, and the scalar decay.
    """
    size = context_size(self.history_length)
    # Those of the meta-dataset, set and not trained: contexts far from it are cut off.
    mean = self.param('mean', nn.initializers.zeros, (size,))
    scale = self.param('scale', nn.initializers.ones, (size,))
    h = jnp.clip((context - mean) / scale, -3.0, 3.0)
    for name in ('hidden', 'hidden_2'):
      h = jnp.tanh(nn.Dense(_WIDTH, precision=_PRECISION, name=name)(h))
    # Zero at first: training starts from copying the newest weight.
    out = nn.Dense(
      self.history_length, kernel_init=nn.initializers.zeros, precision=_PRECISION, name='step'
    )(h)
    return out, self.param('decay', nn.initializers.zeros, ())


def context_size(history_length: int) -> int:
  """The length of a leaf's context for a history of S stages: 16 for 5."""
  d = history_length - 1
  return d + d * (d - 1) // 2 + d + 2


def init_theta(key: jax.Array, history_length: int = HISTORY_LENGTH) -> dict[str, Any]:
  """Fresh parameters for the three kinds of leaf: kind -> Flax parameters of one network."""
  keys = jax.random.split(key, len(KINDS))
  return {kind: _init(k, history_length) for kind, k in zip(KINDS, keys, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _init(key: jax.Array, history_length: int) -> Any:
  example = jnp.zeros(context_size(history_length))
  return ConditionedKNOWN(history_length).init(key, example)['params']


def parameter_shapes(history_length: int) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters of one network that reads so many stages."""
  size = context_size(history_length)
  shapes: dict[str, tuple[int, ...]] = {'decay': (), 'mean': (size,), 'scale': (size,)}
  for layer, fan_in, features in (
    ('hidden', size, _WIDTH), ('hidden_2', _WIDTH, _WIDTH), ('step', _WIDTH, history_length)
  ):  # fmt: skip
    shapes[f'{layer}/kernel'], shapes[f'{layer}/bias'] = (fan_in, features), (features,)
  return shapes


def is_conditioned(params: Any) -> bool:
  """Whether the parameters of one kind are of this network, and not of the paper's."""
  return 'step' in params


def history_length(params: Any) -> int:
  """S, the number of stages that the parameters of one network read."""
  return params['step']['bias'].shape[0]


def context(moments: jax.Array, rate: jax.Array | float) -> jax.Array:
  """What of a leaf's moments and sampling rate does not change with the scale of its weights.

  Args:
    moments: G `[S, S]`.
    rate: r.

  Returns:
    `[context_size(S)]`: the logarithm of each difference's share of the movement; the cosines
    between differences, and between each and the newest weights; the logarithm of movement
    relative to the weights; log r. Zero cosines where something did not move.
  """
  size = moments.shape[0]
  squares = jnp.diagonal(moments)
  movement = _movement(moments)
  norms = _root(squares)
  cosines = moments / (norms[:, None] * norms[None, :])
  cosines = jnp.where((squares[:, None] > 0) & (squares[None, :] > 0), cosines, 0.0)
  upper = jnp.triu_indices(size - 1, 1)
  parts = [
    _log_ratio(squares[:-1], movement),
    cosines[:-1, :-1][upper],
    cosines[:-1, -1],
    _log_ratio(movement, squares[-1])[None],
    jnp.log(jnp.asarray(rate, moments.dtype))[None],
  ]
  return jnp.concatenate(parts)


def outside(params: Any, moments: jax.Array, rate: jax.Array | float) -> jax.Array:
  """How unlike the meta-dataset a leaf is: its farthest context over `FARTHEST`, a scalar.

  Args:
    params: Flax parameters of one network.
    moments: the leaf's G `[S, S]`.
    rate: r.
  """
  distance = (context(moments, rate) - params['mean']) / params['scale']
  # A leaf that never moved has no context to speak of, and stays where it is.
  return jnp.where(_movement(moments) > 0, jnp.abs(distance).max() / FARTHEST, 0.0)


def step_coefficients(params: Any, moments: jax.Array, rate: jax.Array | float) -> jax.Array:
  """The coefficients of v in a leaf's next step theta^-1 - theta^0: `[S]`.

  Args:
    params: Flax parameters of one network.
    moments: the leaf's G `[S, S]`.
    rate: r.
  """
  module = ConditionedKNOWN(history_length(params))
  out, decay = module.apply({'params': params}, context(moments, rate))
  newest = moments[-1, -1]
  ratio = jnp.where(newest > 0, _root(_movement(moments)) / _root(newest), 0.0)
  moved = (_movement(moments) > 0).astype(out.dtype)
  step = jnp.concatenate([out[:-1] * moved, (out[-1] * ratio * moved - decay)[None]])
  return step.astype(moments.dtype)  # Parameters may be wider than weights.


def rollout(
  params: Any, moments: jax.Array, rate: jax.Array | float, steps: tuple[int, ...]
) -> jax.Array:
  """The coefficients of v in theta^-n - theta^0, the window sliding over its own predictions.

  Args:
    params: Flax parameters of one network.
    moments: the leaf's G `[S, S]`.
    rate: r.
    steps: the n asked for, ascending, each at least 1.

  Returns:
    `[len(steps), S]`.
  """
  return slide(lambda g: step_coefficients(params, g, rate), moments, steps)


def slide(step_fn: Any, moments: jax.Array, steps: tuple[int, ...]) -> jax.Array:
  """Slides a linear step over its own predictions.

  Args:
    step_fn: the moments `[S, S]` of a window -> the coefficients `[S]` of its next step.
    moments: of the real window.
    steps: the n asked for, ascending, each at least 1.

  Returns:
    The coefficients of the real window's v in theta^-n - theta^0, `[len(steps), S]`.
  """
  size = moments.shape[0]
  identity = jnp.eye(size, dtype=moments.dtype)

  def slide_once(state: Any, _: Any) -> Any:
    moments, now, moved = state
    step = step_fn(moments)
    # The slid window's v = (d_1, ..., step, theta^0 + step) in terms of the present one's.
    slid = jnp.concatenate([identity[1:-1], step[None], identity[-1:] + step[None]])
    moved = moved + jnp.dot(step, now, precision=_PRECISION)
    now = jnp.dot(slid, now, precision=_PRECISION)
    moments = jnp.dot(jnp.dot(slid, moments, precision=_PRECISION), slid.T, precision=_PRECISION)
    return (moments, now, moved), moved

  start = (moments, identity, jnp.zeros(size, moments.dtype))
  start = trees.vary_alike(start, step_fn(moments))
  _, moved = jax.lax.scan(slide_once, start, length=max(steps))
  return moved[jnp.asarray(steps) - 1]


def stage_coefficients(coefficients: jax.Array) -> jax.Array:
  """From coefficients of v to those of the stages.

  Args:
    coefficients: `[..., S]` of v in a movement.

  Returns:
    `[..., S]`: of theta^i - theta^0 for the S - 1 older stages, oldest first, and of theta^0.
  """
  differences = coefficients[..., :-1]
  older = jnp.concatenate([jnp.zeros_like(differences[..., :1]), differences[..., :-1]], axis=-1)
  return jnp.concatenate([older - differences, coefficients[..., -1:]], axis=-1)


def _movement(moments: jax.Array) -> jax.Array:
  return jnp.diagonal(moments)[:-1].mean()


def _root(x: jax.Array) -> jax.Array:
  """The square root, 1 for 0: what is divided by it is 0, and has a gradient."""
  return jnp.sqrt(jnp.where(x > 0, x, 1.0))


def _log_ratio(x: jax.Array, y: jax.Array) -> jax.Array:
  ratio = x / jnp.where(y > 0, y, 1.0)
  return jnp.log(jnp.clip(jnp.where(y > 0, ratio, 1.0), jnp.exp(_LOG_LEAST), jnp.exp(-_LOG_LEAST)))
