"""KNOWN: the network that predicts one scalar weight's next value from its history.

The paper, section 3; one network for each kind of leaf, applied to every scalar weight alone:

  w = [theta^(S-1), ..., theta^0]        d = w[1:] - w[:-1]
  stream(x):  h = embed(x)                                        x -> 64, no activation
              z = relu(squeeze(h))                                64 -> 8
              h = offset(z) + amplitude(z) * exp(gate(z) * h)     8 -> 64, three times
              h = leaky_relu(project(h), slope 0.3)               64 -> 32
  residual = tanh(residual(concat(stream(w), stream(d))))
  theta^-1 = theta^0 + residual

The paper's has raw weights in and a raw residual out. Parameters with a `bound` are of a network
in units of the leaf, so that scaling all weights of a leaf scales its predictions:

  s, q = root mean squares over the leaf of the differences and of theta^0
  x^t = clip((theta^t - theta^0) / s, +-bound) + theta^0 / q      in place of theta^t
  theta^-1 = theta^0 + 2 s residual

A leaf that never moved stays where it is. A set of parameters for the three kinds of leaf is called
`theta`: a dict kind -> Flax parameters of one `KNOWN`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from know_jax import trees
from know_jax.kinds import KINDS

HISTORY_LENGTH = 5
"""S, the number of stages KNOWN reads."""

_FEATURES, _BOTTLENECK, _PROJECTION = 64, 8, 32
_SLOPE = 0.3
_BOUND, _REACH = 8.0, 2.0
# Keras' VarianceScaling(0.1, 'fan_in', 'uniform'), the authors' choice where they add a penalty.
_SMALL = nn.initializers.variance_scaling(0.1, 'fan_in', 'uniform')
# The predictor's own arithmetic is the product: no TF32 or bfloat16 products on accelerators.
_PRECISION = jax.lax.Precision.HIGHEST


def _dense(features: int, name: str, init: Any = None) -> nn.Dense:
  return nn.Dense(
    features,
    kernel_init=init or nn.initializers.glorot_uniform(),
    precision=_PRECISION,
    name=name,
  )


class Stream(nn.Module):
  """One of the two halves of KNOWN: [n] -> [32]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps weights or differences `[n]` to features `[32]`."""
    h = _dense(_FEATURES, 'embed', _SMALL)(x)
    z = nn.relu(_dense(_BOTTLENECK, 'squeeze')(h))
    gate = _dense(_FEATURES, 'gate')(z)
    h = _dense(_FEATURES, 'offset')(z) + _dense(_FEATURES, 'amplitude')(z) * jnp.exp(gate * h)
    return nn.leaky_relu(_dense(_PROJECTION, 'project', _SMALL)(h), _SLOPE)


class KNOWN(nn.Module):
  """The authors' network for one scalar weight; 9,425 parameters for a history of 5.

  Example:
    params = KNOWN().init(jax.random.key(0), jnp.zeros(5))['params']
    residual = jax.vmap(lambda w: KNOWN().apply({'params': params}, w))(histories)  # [N, 5] -> [N]
  """

  @nn.compact
  def __call__(self, history: jax.Array) -> jax.Array:
    """Predicts the step from the newest weight to the next.

    Args:
      history: `[S]`, one scalar weight at S stages, oldest first.

    Returns:
      The residual theta^-1 - theta^0, a scalar in (-1, 1).
    """
    streams = [Stream(name='weights')(history), Stream(name='differences')(jnp.diff(history))]
    return jnp.tanh(_dense(1, 'residual')(jnp.concatenate(streams))[0])


def init_theta(key: jax.Array, history_length: int = HISTORY_LENGTH) -> dict[str, Any]:
  """Fresh parameters for the three kinds of leaf: kind -> Flax parameters of one KNOWN."""
  keys = jax.random.split(key, len(KINDS))
  return {kind: _init(k, history_length) for kind, k in zip(KINDS, keys, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _init(key: jax.Array, history_length: int) -> Any:
  return KNOWN().init(key, jnp.zeros(history_length))['params']


def init_scaled_theta(key: jax.Array, history_length: int = HISTORY_LENGTH) -> dict[str, Any]:
  """Fresh parameters in units of the leaf: kind -> those of one KNOWN, and the constant `bound`."""
  bound = jnp.float32(_BOUND)
  return {
    kind: {**params, 'bound': bound} for kind, params in init_theta(key, history_length).items()
  }


def is_scaled(params: Any) -> bool:
  """Whether the parameters of one kind are of a network in units of the leaf."""
  return 'bound' in params


def units(moments: jax.Array) -> jax.Array:
  """The units of a leaf, from its second moments `[S, S]`: s and q, `[2]`."""
  squares = jnp.diagonal(moments)
  squares = jnp.stack([squares[:-1].mean(), squares[-1]])
  # The gradient of a root of 0 would be infinite.
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def history_length(params: Any) -> int:
  """S, the number of stages that the parameters of one KNOWN read."""
  return params['weights']['embed']['kernel'].shape[0]


def penalty(params: Any) -> jax.Array:
  """The authors' L1 penalty in training, on `embed` and `project`: 1e-6 kernels, 0.1 biases."""
  total = jnp.zeros(())
  for stream in ('weights', 'differences'):
    for layer in ('embed', 'project'):
      leaf = params[stream][layer]
      total += 1e-6 * jnp.abs(leaf['kernel']).sum() + 0.1 * jnp.abs(leaf['bias']).sum()
  return total


def residuals(params: Any, windows: jax.Array) -> jax.Array:
  """KNOWN on many weights at once, by exact algebra that needs 17 % fewer multiplications.

  Equal to `jax.vmap(KNOWN().apply)` up to rounding. The history axis leads, so that all products
  are (small matrix) x (matrix with N columns).

  Args:
    params: Flax parameters of one KNOWN.
    windows: `[S, N]` float32, oldest stage first.

  Returns:
    The residuals, `[N]`.
  """
  return fused_residuals(fuse(params), windows)


def fuse(params: Any) -> dict[str, Any]:
  """What `residuals` makes of the parameters alone: to be made once, before a loop over weights.

  As `embed` has no activation, `squeeze` of it is one affine map of the input; and as `offset` is
  affine in z, so is its share of `project`.

  Args:
    params: Flax parameters of one KNOWN.

  Returns:
    Affine maps, each as a matrix `[outputs, inputs]` and a column `[outputs, 1]`: of each stream
    name -> map, where `squeeze` is of the input, `offset` has gone through `project`, and
    `project` is a matrix alone; and `residual`. The constant `bound` is as it was.
  """
  result = {
    'weights': _fuse_stream(params['weights']),
    'differences': _fuse_stream(params['differences']),
    'residual': _transposed(**params['residual']),
  }
  return result | {'bound': params['bound']} if is_scaled(params) else result


def _fuse_stream(p: Any) -> dict[str, Any]:
  embed, squeeze, offset, project = p['embed'], p['squeeze'], p['offset'], p['project']
  return {
    'embed': _transposed(**embed),
    'squeeze': _transposed(
      _dot(embed['kernel'], squeeze['kernel']),
      _dot(embed['bias'], squeeze['kernel']) + squeeze['bias'],
    ),
    'gate': _transposed(**p['gate']),
    'amplitude': _transposed(**p['amplitude']),
    'offset': _transposed(
      _dot(offset['kernel'], project['kernel']),
      _dot(offset['bias'], project['kernel']) + project['bias'],
    ),
    'project': project['kernel'].T,
  }


def _transposed(kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return kernel.T, bias[:, None]


def fused_residuals(
  fused: Any, windows: jax.Array, exp: Callable[[jax.Array], jax.Array] = jnp.exp
) -> jax.Array:
  """`residuals` from what `fuse` gives: `[S, N]` -> `[N]`; measurements leave out its `exp`."""
  streams = [
    _fused_stream(fused['weights'], windows, exp),
    _fused_stream(fused['differences'], windows[1:] - windows[:-1], exp),
  ]
  return jnp.tanh(_affine(fused['residual'], jnp.concatenate(streams))[0])


def fused_steps(fused: Any, windows: jax.Array, of_leaf: jax.Array | None = None) -> jax.Array:
  """The steps theta^-1 - theta^0 of many weights: `[N]`.

  Args:
    fused: `fuse` of the parameters of one KNOWN.
    windows: `[S, N]`, oldest stage first.
    of_leaf: the `units` of the weights' leaves, `[2, N]` or `[2, 1]`; only in units of the leaf.
  """
  if of_leaf is None:
    return fused_residuals(fused, windows)
  movement, size = (jnp.where(unit > 0, unit, 1.0) for unit in of_leaf)
  bound = jax.lax.stop_gradient(fused['bound'])
  x = jnp.clip((windows - windows[-1]) / movement, -bound, bound) + windows[-1] / size
  return _REACH * of_leaf[0] * fused_residuals(fused, x)


def _fused_stream(maps: Any, x: jax.Array, exp: Callable[[jax.Array], jax.Array]) -> jax.Array:
  h = _affine(maps['embed'], x)
  z = nn.relu(_affine(maps['squeeze'], x))
  gate, amplitude = _affine(maps['gate'], z), _affine(maps['amplitude'], z)
  out = _dot(maps['project'], amplitude * exp(gate * h))
  return nn.leaky_relu(out + _affine(maps['offset'], z), _SLOPE)


def _affine(matrix_and_column: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
  matrix, column = matrix_and_column
  return _dot(matrix, x) + column


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, precision=_PRECISION)


def rollout(
  fused: Any, windows: jax.Array, steps: tuple[int, ...], of_leaf: jax.Array | None = None
) -> jax.Array:
  """Predicts several steps ahead by sliding the window over its own predictions.

  Args:
    fused: `fuse` of the parameters of one KNOWN.
    windows: `[S, N]`, oldest stage first.
    steps: the steps asked for, ascending, each at least 1.
    of_leaf: as of `fused_steps`; the units stay those of the real window.

  Returns:
    The predicted weights, `[len(steps), N]`.
  """

  def step(windows: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    # Parameters may be wider than weights.
    predicted = windows[-1] + fused_steps(fused, windows, of_leaf).astype(windows.dtype)
    return jnp.concatenate([windows[1:], predicted[None]]), predicted

  # A loop: many steps ahead would take long to compile one by one.
  start = trees.vary_alike(windows, fused, of_leaf)
  _, path = jax.lax.scan(step, start, length=max(steps))
  return path[jnp.asarray(steps) - 1]
