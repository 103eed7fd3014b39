"""How fast weights are predicted, beside Keras, the plain module, large products and a copy."""

import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from know_jax.benchmark import keras_rivals, known_profile
from know_jax.benchmark.histories import (
  History,
  by_kind,
  num_predicted,
  of_kernels,
  of_network,
  of_size,
)
from know_jax.benchmark.settings import STAGES, Settings, Target
from know_jax.benchmark.timing import Times, goal, race, rates, speedups, spread
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api, file_job, from_files
from know_jax.predictors import known
from know_jax.trees import named_leaves

OURS, LEAF = 'known', 'known_leaf'
PLAIN, KERAS, PRODUCT, COPY = 'plain vmap', 'Keras', 'large product', 'copy'
LINEAR = (
  'persistence', 'linear_fit', 'log_fit', 'task_vector', 'shrink', 'average', 'least_squares', LEAF
)  # fmt: skip
"""What is a weighted sum of the stages."""

FLOPS = 2 * (5 * (64 + 8) + 4 * (64 + 8) + 2 * (8 * 64 + 8 * 64 + 64 * 32 + 8 * 32) + 64)
"""Of the paper's network, a weight: two for each multiplication of its matrix products."""

SAME = 1e-5
"""Keras may differ from the module by this much; more is an error."""


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Whole networks by KNOWN: times, rates, ratios, differences to the plain module."""
  networks = [_network(target, settings, show) for target in settings.predicted]
  model, last = networks[-1]['model'], networks[-1]['speedup']
  apart = max(network['difference'][OURS] for network in networks)
  return {
    'note': 'One step ahead for every weight of a network. `known` and `known_leaf` check what '
    'they predict, as by default; the others do not. `known` has, as the rivals, untrained '
    'parameters for weights as they are. *plain vmap* is the Flax module under '
    f'`jax.vmap` and `jax.jit`, leaf by leaf, at most {settings.plain_chunk:,} weights at a time. '
    '*Keras* is the functional model rebuilt from its description, with the same weights; '
    '`predict` is called once for each kind of leaf with the fastest of several batch sizes. '
    '*large product* is how many weights a second the arithmetic of a product of '
    f'{settings.product} x {settings.product} matrices would allow: `known` needs '
    f'{FLOPS / 1000:.1f} kFLOP a weight, its 128 exponentials not counted. {keras_rivals.absent()} '
    f'{known_profile.NOTE}',
    'networks': networks,
    'tables': {
      f'{n["model"]}: {n["weights"]:,} weights in {n["leaves"]} leaves': [
        {
          '': name, 'weights a second': rate, '`known` is faster by': n['speedup'].get(name),
          'largest difference to plain vmap': n['difference'].get(name),
        }
        for name, rate in n['weights_a_second'].items()
      ]
      for n in networks
    } | {'Where the time of `known` goes': known_profile.measure(
      settings.plain_chunk, settings.product, FLOPS, settings.linear[1]
    )},
    'goals': [
      goal(f'`known` over Keras, {model}', last.get(KERAS, {}).get('median'), least=4),
      goal(f"`known` over a large product's rate, {model}", last[PRODUCT]['median'], least=0.7),
      goal('largest difference of `known` to the plain module', apart, most=1e-6),
    ],
  }  # fmt: skip


def _network(target: Target, settings: Settings, show: bool) -> dict[str, Any]:
  history = of_network(target)
  weights, leaves = num_predicted(history)
  # On weights as they are, as Keras' are; values make no difference to speed.
  theta, placed = known.init_theta(jax.random.key(0)), jax.device_put(history)
  plain = plain_vmap(theta, settings.plain_chunk)
  matrix = jnp.asarray(
    np.random.default_rng(0).standard_normal((settings.product,) * 2), jnp.float32
  )
  square = jax.jit(lambda x: jnp.dot(x, x, precision=jax.lax.Precision.HIGHEST))
  contestants: dict[str, Callable[[], Any]] = {
    OURS: lambda: api.predict(placed, predictor=OURS, theta=theta),
    LEAF: lambda: api.predict(placed, predictor=LEAF, rate=0.5),
    PLAIN: lambda: plain(placed),
    PRODUCT: lambda: square(matrix),
  }
  if not keras_rivals.absent():
    largest = max(
      (stages for group in by_kind(history).values() for stages in group.values()),
      key=lambda stages: stages[-1].size,
    )
    windows = np.stack([np.ravel(stage)[: 1 << 18] for stage in largest], axis=-1)
    keras = keras_rivals.KerasKNOWN(theta, windows, settings.keras_batches)
    contestants[KERAS] = lambda: keras(history)
  with warnings.catch_warnings():
    # These weights are like no network's.
    warnings.simplefilter('ignore', PredictionWarning)
    reference = plain(placed)
    differences = {OURS: largest_difference(named_leaves(contestants[OURS]()), reference)}
    if KERAS in contestants:
      apart = largest_difference(contestants[KERAS](), reference)
      differences[KERAS] = check_equal(KERAS, apart, SAME)
    times = race(contestants, target.repetitions, f'predict {target.model}', show=show)
  # As if every weight took only its share of the product.
  share = weights * FLOPS / (2 * settings.product**3)
  times[PRODUCT] = [share * seconds for seconds in times[PRODUCT]]
  return {
    'model': target.model,
    'weights': weights,
    'leaves': leaves,
    'seconds': times,
    'weights_a_second': rates(times, weights),
    'speedup': speedups(times, OURS),
    'difference': differences,
  }


def linear(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Weighted sums of the stages, beside a copy of as many bytes."""
  weights, repetitions = settings.linear
  history = of_size(weights)
  moved = 4 * (STAGES + 1) * weights  # All stages are read, one is written.
  source = np.ones(moved // 8, np.float32)
  target = np.zeros_like(source)
  contestants: dict[str, Callable[[], Any]] = {COPY: lambda: np.copyto(target, source)}
  contestants |= {name: prediction(history, name) for name in LINEAR}
  times = race(contestants, repetitions, 'linear predictors', show=show)
  speed = rates(times, moved / 1e9)
  # How fast each is for one copy, within each round.
  ratio = {name: spread(list(np.divide(times[COPY], times[name]))) for name in LINEAR}
  return {
    'note': f'One step ahead for {weights:,} float32 weights in memory, {STAGES} stages; GB are of '
    f'stages read and prediction written. *{COPY}* is one core copying an array, which reads and '
    'writes as many bytes in all. What needs moments reads all stages twice: at the speed of the '
    f'copy that is a share of {(STAGES + 1) / (2 * STAGES + 1):.2f}.',
    'seconds': times,
    'tables': {'': [
      {'': name, 'GB a second': speed[name], 'share of the copy': ratio.get(name)}
      for name in contestants
    ]},
    'goals': [
      goal(f'`{name}` over a copy of the same bytes', ratio[name]['median'], least=0.5)
      for name in LINEAR
    ],
  }  # fmt: skip


def many_leaves(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Many small leaves, beside one leaf of as many weights."""
  count, size = settings.leaves
  names = ('task_vector', LEAF, OURS)
  seconds, rows = _many_and_one(settings.leaves, names, settings, show)
  few, few_rows = _many_and_one(settings.few, names, settings, show)
  files, files_rows = _from_files(count, size, names[:2], settings.linear[1], show)
  what = f'{count:,} leaves of {size:,} weights'
  goals = [
    *(
      goal(f'seconds of `{name}` for {what}', spread(seconds[name]['many'])['median'], most=1)
      for name in names[:2]
    ),
    *(
      goal(f'seconds of `{name}` from files for {what}', spread(files[name])['median'], most=3)
      for name in names[:2]
    ),
    *(
      goal(
        f'time of `{name}` for {settings.few[0]} leaves over that for one of the same weights',
        speedups(few[name], 'one')['many']['median'], most=1.1,
      )
      for name in names
    ),
  ]  # fmt: skip
  return {
    'note': f'{count:,} dense kernels of {size:,} weights, one step; and one kernel of as many. '
    'From files: the same in one safetensors file a stage, checked, read, predicted and written '
    'durably, in a process that has started.',
    'seconds': seconds,
    'few_seconds': few,
    'file_seconds': files,
    'tables': {'': rows, f'{settings.few[0]} larger leaves': few_rows, 'From files': files_rows},
    'goals': goals,
  }


def _many_and_one(
  leaves: tuple[int, int], names: Sequence[str], settings: Settings, show: bool
) -> tuple[dict[str, Times], list[dict[str, Any]]]:
  """Seconds for leaves and for one leaf of as many weights, and rows of a table."""
  count, size = leaves
  many, one = of_kernels(count, size, 1), of_kernels(1, count * size, 1)
  rows, seconds = [], {}
  for name in names:
    contestants = {'many': prediction(many, name), 'one': prediction(one, name)}
    seconds[name] = race(contestants, settings.linear[1], f'{count} leaves', show=show)
    rows.append({
      '': name,
      f'{count:,} leaves, s': spread(seconds[name]['many']),
      'one leaf, s': spread(seconds[name]['one']),
      'ratio': speedups(seconds[name], 'one')['many'],
    })  # fmt: skip
  return seconds, rows


def _from_files(
  count: int, size: int, names: Sequence[str], repetitions: int, show: bool
) -> tuple[Times, list[dict[str, Any]]]:
  """Likewise from files: seconds from the paths to the prediction on the disk."""
  with tempfile.TemporaryDirectory(prefix='know_jax-') as place:
    folder = Path(place)
    paths = [folder / f'{stage}.safetensors' for stage in range(STAGES)]
    for path, stage in zip(paths, of_kernels(count, size, 1), strict=True):
      named = {name.replace('/', '.'): leaf for name, leaf in named_leaves(stage).items()}
      safetensors.numpy.save_file(named, path)

    def call(name: str) -> None:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', PredictionWarning)
        job = file_job.prepare(paths, predictors=[name], steps=1)
        from_files.write(job, folder / 'predicted', show_progress=False)
      shutil.rmtree(folder / 'predicted')

    contestants = {name: functools.partial(call, name) for name in names}
    seconds = race(contestants, repetitions, 'leaves in files', show=show)
  return seconds, [{'': name, 'seconds': spread(seconds[name])} for name in names]


def prediction(history: History, name: str) -> Callable[[], Any]:
  """A call that predicts a history one step ahead, without warnings."""

  def call() -> Any:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', PredictionWarning)
      return api.predict(history, predictor=name, rate=0.5)

  return call


def plain_vmap(theta: Any, chunk: int) -> Callable[[History], dict[str, jax.Array]]:
  """The paper's module by `vmap`, leaf by leaf, at most `chunk` weights of one at a time.

  Gives a function: a history -> path -> the predicted leaf.
  """

  def residual(params: Any, window: jax.Array) -> Any:
    return known.KNOWN().apply({'params': params}, window)

  residuals = jax.jit(jax.vmap(residual, in_axes=(None, 0)))

  def of_leaf(params: Any, stages: list[Any]) -> jax.Array:
    windows = jnp.stack([jnp.ravel(stage) for stage in stages], axis=-1)
    parts = [residuals(params, windows[i : i + chunk]) for i in range(0, len(windows), chunk)]
    return (windows[:, -1] + jnp.concatenate(parts)).reshape(stages[-1].shape)

  return lambda history: {
    path: of_leaf(theta[kind], stages)
    for kind, leaves in by_kind(history).items()
    for path, stages in leaves.items()
  }


def largest_difference(found: dict[str, Any], reference: dict[str, Any]) -> float:
  """Between two predictions, over all leaves of `reference`."""
  return max(float(np.abs(np.asarray(found[path]) - x).max()) for path, x in reference.items())


def check_equal(name: str, difference: float, tolerance: float) -> float:
  """The difference; ArithmeticError beyond the tolerance: the rival computes something else."""
  if not difference <= tolerance:
    raise ArithmeticError(f'{name} differs by {difference:.3g}; expected at most {tolerance:.3g}.')
  return difference
