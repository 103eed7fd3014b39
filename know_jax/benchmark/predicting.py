"""How fast whole networks are predicted, beside other ways to do the same, and beside the limit."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark import keras_rivals, rivals
from know_jax.benchmark.histories import by_kind, num_predicted, of_network
from know_jax.benchmark.settings import Settings, Target
from know_jax.benchmark.timing import race, rates, speedups, spread
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api
from know_jax.predictors.parameters import load_known
from know_jax.trees import named_leaves

OURS = 'known'
CONDITIONED = 'known_leaf'
PLAIN, NUMPY, KERAS = 'plain vmap', 'NumPy', 'Keras'
PRODUCT, LARGE_PRODUCT = 'product as in KNOWN', 'large product'

SAME = 1e-5
"""Other ways may differ from the module by this much; more is an error."""

_RATE = 0.5
# Of the products in KNOWN the largest are nearly of this shape: a kernel times 8192 columns.
_KERNEL, _COLUMNS = 64, 8192


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Every network of the settings: times, rates, ratios, differences, and the arithmetic limit."""
  return {
    'keras_absent': keras_rivals.absent(),
    'plain_chunk': settings.plain_chunk,
    'networks': [_network(target, settings, show) for target in settings.predicted],
  }


def _network(target: Target, settings: Settings, show: bool) -> dict[str, Any]:
  history = of_network(target)
  weights, leaves = num_predicted(history)
  theta, conditioned = load_known(), load_known(shipped='known_leaf')
  placed = jax.device_put(history)

  def ours(predictor: str) -> Any:
    return lambda: api.predict(placed, predictor=predictor, rate=_RATE)

  plain = rivals.plain_vmap(theta, settings.plain_chunk)
  contestants: dict[str, Any] = {
    OURS: ours('known'),
    CONDITIONED: ours('known_leaf'),
    PLAIN: lambda: plain(placed),
  }
  others: dict[str, rivals.Rival] = {}
  batch_size = None
  if jax.default_backend() == 'cpu':
    others[NUMPY] = rivals.in_numpy(theta)
  if not keras_rivals.absent():
    others[KERAS] = keras = keras_rivals.KerasKNOWN(
      theta, _some_windows(history), settings.keras_batches
    )
    batch_size = keras.batch_size
  contestants |= {name: _bound(rival, history) for name, rival in others.items()}
  with warnings.catch_warnings():
    # These weights are like no network's.
    warnings.simplefilter('ignore', PredictionWarning)
    wanted = plain(placed)
    differences = {
      name: rivals.check_equal(name, rivals.largest_difference(rival(history), wanted), SAME)
      for name, rival in others.items()
    }
    for name, reference in (
      (OURS, wanted),
      (CONDITIONED, rivals.plain_conditioned(conditioned, _RATE)(placed)),
    ):
      found = named_leaves(contestants[name]())
      differences[name] = rivals.largest_difference(found, reference)
    del wanted, found, reference
    times = race(
      contestants | products(settings), target.repetitions, f'predict {target.model}', show=show
    )
  flops = {
    PRODUCT: 2 * _KERNEL**2 * _COLUMNS * settings.products,
    LARGE_PRODUCT: 2 * settings.product**3,
  }
  seconds = {name: times[name] for name in contestants}
  return {
    'model': target.model,
    'weights': weights,
    'leaves': leaves,
    'keras_batch_size': batch_size,
    'seconds': seconds,
    'weights_a_second': rates(seconds, weights),
    'speedup': speedups(seconds, OURS),
    'difference': differences,
    'roofline': roofline(times, flops, weights),
  }


def roofline(times: Any, flops: Mapping[str, float], weights: int) -> dict[str, Any]:
  """The arithmetic limit by the products timed in the same rounds, and what of it is reached.

  Args:
    times: of the products and of `OURS`.
    flops: of each product.
    weights: how many `OURS` predicts.

  Returns:
    `seconds` and `flops_a_second` of the products; for each of them the `limit` in weights a second
    and the share `achieved` of it, spreads.
  """
  pairs = {name: list(zip(times[name], times[OURS], strict=True)) for name in flops}
  limits = {
    name: [amount / seconds / rivals.FUSED_FLOPS for seconds, _ in pairs[name]]
    for name, amount in flops.items()
  }
  achieved = {
    name: [
      weights / ours / limit for (_, ours), limit in zip(pairs[name], limits[name], strict=True)
    ]
    for name in flops
  }
  return {
    'flops_a_weight': rivals.FUSED_FLOPS,
    'flops': flops,
    'seconds': {name: times[name] for name in flops},
    'flops_a_second': {name: rates(times, amount)[name] for name, amount in flops.items()},
    'limit': {name: spread(values) for name, values in limits.items()},
    'achieved': {name: spread(values) for name, values in achieved.items()},
  }


def products(settings: Settings) -> dict[str, Any]:
  """Products of matrices to be timed, float32 in full precision."""
  precision = jax.lax.Precision.HIGHEST
  rng = np.random.default_rng(0)
  # Orthogonal, so that the numbers keep their size.
  kernel = jnp.asarray(np.linalg.qr(rng.standard_normal((_KERNEL, _KERNEL)))[0], jnp.float32)
  columns = jnp.asarray(rng.standard_normal((_KERNEL, _COLUMNS)), jnp.float32)
  large = jnp.asarray(rng.standard_normal((settings.product,) * 2), jnp.float32)

  @jax.jit
  def chain(kernel: jax.Array, columns: jax.Array) -> jax.Array:
    def multiply(_: Any, x: jax.Array) -> jax.Array:
      return jnp.dot(kernel, x, precision=precision)

    return jax.lax.fori_loop(0, settings.products, multiply, columns)

  square = jax.jit(lambda x: jnp.dot(x, x, precision=precision))
  return {PRODUCT: lambda: chain(kernel, columns), LARGE_PRODUCT: lambda: square(large)}


def _bound(rival: rivals.Rival, history: Any) -> Any:
  return lambda: rival(history)


def _some_windows(history: Any, most: int = 1 << 18) -> np.ndarray:
  """Windows `[N, S]` of the largest leaf."""
  leaves = [stages for group in by_kind(history).values() for stages in group.values()]
  stages = max(leaves, key=lambda stages: stages[-1].size)
  return np.stack([np.ravel(stage)[:most] for stage in stages], axis=-1)
