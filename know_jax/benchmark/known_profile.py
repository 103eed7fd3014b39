"""Where the time of KNOWN goes: its exponentials, its small products, and what is around them."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark.timing import spread
from know_jax.nowcast import api
from know_jax.predictors import known
from know_jax.predictors.parameters import load_known

_BLOCK = 2048
_PRODUCT = 'large product'

NOTE = (
  'Where its time goes is CPU time a weight of a dense kernel, on all threads together, and how '
  "much of a large product's rate that is. *the network* is the arithmetic alone, in one "
  'program; *without exponentials* leaves out their 128; *products* are its matrix products '
  'alone, *exponentials* those alone; *predict* is a call with its checks, copies and the hand- '
  'over between threads. Most products have an inner size of 4, 5 or 8, so that each of their '
  'numbers is loaded and stored for few multiplications. Where the products alone stay below '
  'the rate that is asked for, nothing around them can reach it; wider vectors (AVX-512) or '
  'fewer products could.'
)


def measure(weights: int, size: int, flops: int, repetitions: int) -> list[dict[str, Any]]:
  """Rows of a table.

  Args:
    weights: of the kernel; rounded up to whole blocks.
    size: rows and columns of the large product.
    flops: of the network's products, a weight.
    repetitions: how often each is timed, in turn.
  """
  weights = -(-weights // _BLOCK) * _BLOCK
  params = load_known()['fc']
  rows = 0.05 * np.random.default_rng(0).standard_normal((known.HISTORY_LENGTH, weights))
  rows = rows.astype(np.float32)
  history = [{'dense/kernel': row[:, None]} for row in rows]
  matrix = np.random.default_rng(1).standard_normal((size, size), np.float32)
  square = jax.jit(functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))
  fused = known.fuse(params)
  parts: dict[str, Callable[[jax.Array], jax.Array]] = {
    'the network': functools.partial(known.fused_residuals, fused),
    'without exponentials': functools.partial(known.fused_residuals, fused, exp=lambda x: x),
    'products': functools.partial(_products, fused),
    'exponentials': _exponentials,
  }
  calls: dict[str, Callable[[], Any]] = {
    name: functools.partial(_in_blocks(part), rows) for name, part in parts.items()
  }
  calls['predict'] = lambda: api.predict(history, predictor='known', on_bad='ignore')
  calls[_PRODUCT] = lambda: square(matrix, matrix)
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(-1, repetitions):
    for name, call in calls.items():
      began = time.process_time()
      jax.block_until_ready(call())
      if turn >= 0:
        seconds[name].append(time.process_time() - began)
  share = weights * flops / (2 * size**3)
  product = np.asarray(seconds.pop(_PRODUCT)) * share
  return [
    {
      '': name, 'ns of CPU a weight': spread([1e9 * s / weights for s in times]),
      'share of a large product': spread(list(product / np.maximum(times, 1e-9))),
    }
    for name, times in seconds.items()
  ]  # fmt: skip


def _in_blocks(part: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
  """A function of blocks `[S, N]` to `[N]`, one after the other as `predict` takes them."""

  def run(rows: jax.Array) -> jax.Array:
    def body(i: jax.Array, out: jax.Array) -> jax.Array:
      block = jax.lax.dynamic_slice_in_dim(rows, i * _BLOCK, _BLOCK, 1)
      return jax.lax.dynamic_update_slice(out, part(block), (i * _BLOCK,))

    return jax.lax.fori_loop(0, rows.shape[1] // _BLOCK, body, jnp.zeros(rows.shape[1]))

  cpu = jax.default_backend() == 'cpu'
  return jax.jit(run, compiler_options={'xla_cpu_prefer_vector_width': 512} if cpu else None)


def _dot(matrix: Any, x: jax.Array) -> jax.Array:
  return jnp.dot(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _products(fused: Any, block: jax.Array) -> jax.Array:
  total = jnp.zeros(block.shape[1])
  for maps, x in ((fused['weights'], block), (fused['differences'], block[1:] - block[:-1])):
    h, z = _dot(maps['embed'][0], x), _dot(maps['squeeze'][0], x)
    last = [
      _dot(maps['project'], h),
      *(_dot(maps[n][0], z) for n in ('gate', 'amplitude', 'offset')),
    ]
    total += functools.reduce(jnp.add, [values[0] for values in last])
  return total


def _exponentials(block: jax.Array) -> jax.Array:
  """As many as of the network, 128 a weight."""
  scales = jnp.linspace(-1, 1, 128)[:, None]
  return jnp.exp(scales * block[:1]).sum(0)
