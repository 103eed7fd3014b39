"""Every predictor but KNOWN: pure functions of one leaf's history.

Notation: Theta^0 is the newest weight, Theta^i the one i stages older (trained on r^i of the data),
tau_i = Theta^0 - Theta^i, delta_i = Theta^(i-1) - Theta^i, n the step: Theta^-n is predicted, the
weight "as if trained on" r^-n times the data. All are evaluated at step n, not iterated, and are
coordinate-wise but `tsv`. They take the history of one leaf as a list of arrays `[...]`, oldest
first, in the dtype to compute in, and return an array of the same shape.

The entry points are `know_jax.predict` and `know_jax.PREDICTORS`, which check the history and route
the leaves; the paper's table 1 compares most of these.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.kinds import KINDS
from know_jax.predictors import known_leaf
from know_jax.predictors.known import HISTORY_LENGTH
from know_jax.predictors.parameters import least_squares_coefficients

History = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What a predictor may know of a leaf beside its history.

  Attributes:
    path: the keys joined by `/`.
    kind: 'conv', 'fc' or 'bias'.
  """

  path: str
  kind: str


def persistence(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """Theta^0: naive transfer."""
  del leaf, steps, rate
  return history[-1]


def linear_fit(
  history: History, leaf: Leaf, steps: int, rate: float, *, regressor: str
) -> jax.Array:
  """Least squares of a + b x over the history, read at step n.

  `regressor='size'`: x = r^i, the share of the data, read at r^-n; `'index'`: x = -i, read at n.
  """
  del leaf
  age = np.arange(len(history) - 1, -1, -1, dtype=np.float64)
  if regressor == 'size':
    return _line(history, rate**age, rate**-steps)
  return _line(history, -age, steps)


def log_fit(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """Least squares of a + b log x with x = r^i, the share of the data, read at x = r^-n."""
  del leaf
  age = np.arange(len(history) - 1, -1, -1, dtype=np.float64)
  return _line(history, age * math.log(rate), -steps * math.log(rate))


def exp_fit(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """sign(Theta^0) exp(least squares of log max(|theta|, 1e-12) on the index), read at step n."""
  del leaf, rate
  age = np.arange(len(history) - 1, -1, -1, dtype=np.float64)
  logs = [jnp.log(jnp.maximum(jnp.abs(theta), 1e-12)) for theta in history]
  return jnp.sign(history[-1]) * jnp.exp(_line(logs, -age, steps))


def task_vector(
  history: History, leaf: Leaf, steps: int, rate: float, *, lam: float, variant: str
) -> jax.Array:
  """Theta^0 + lam tau_n, or with `variant='two_point'` Theta^0 + lam n tau_1.

  Ilharco et al., "Editing models with task arithmetic", ICLR 2023, as the paper uses it.
  """
  del leaf, rate
  if variant == 'two_point':
    return history[-1] + lam * steps * _tau(history, 1)
  return history[-1] + lam * _tau(history, steps)


def magmax(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """Theta^0 + for each coordinate the entry of largest magnitude among tau_1..tau_n.

  A tie goes to the larger i. Marczak et al., "MagMax", ECCV 2024.
  """
  del leaf, rate
  chosen = _tau(history, 1)
  for i in range(2, steps + 1):
    tau = _tau(history, i)
    chosen = jnp.where(jnp.abs(tau) >= jnp.abs(chosen), tau, chosen)
  return history[-1] + chosen


def consensus_ta(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """Theta^0 + c tau_n, c = [at least 2 of the n masks]; the whole tau_n where n < 3.

  m_i = |delta_i| > 0.4 |sum_j delta_j - delta_i|, i and j in 1..n, and the sum is tau_n. Wang et
  al., "Localizing task information for improved model merging and compression", ICML 2024.
  """
  del leaf, rate
  total = _tau(history, steps)
  if steps < 3:
    return history[-1] + total
  deltas = [history[-i] - history[-i - 1] for i in range(1, steps + 1)]
  votes = sum((jnp.abs(d) > 0.4 * jnp.abs(total - d)).astype(jnp.int32) for d in deltas)
  return history[-1] + jnp.where(votes >= 2, total, 0)


def tsv(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """Theta^0 + the best rank-k approximation of tau_n, an m x n matrix, k = max(1, min(m, n) // 10).

  A convolution's HWIO is read as (HWI, O), attention's query, key and value kernels (D, H, K) as
  (D, HK), its output kernel (H, K, D) as (HK, D); other leaves take the whole tau_n. Gargiulo et
  al., "Task singular vectors", CVPR 2025.
  """
  del rate
  tau = _tau(history, steps)
  if leaf.kind == 'bias' or tau.ndim < 2:
    return history[-1] + tau
  keys = leaf.path.removesuffix('/value').split('/')
  in_axes = 1 if leaf.kind == 'fc' and keys[-2:-1] != ['out'] else tau.ndim - 1
  matrix = tau.reshape(math.prod(tau.shape[:in_axes]), -1)
  rank = max(1, min(matrix.shape) // 10)
  u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
  low = jnp.matmul(u[:, :rank] * s[:rank], vt[:rank], precision=jax.lax.Precision.HIGHEST)
  return history[-1] + low.reshape(tau.shape)


def shrink(
  history: History, leaf: Leaf, steps: int, rate: float, *, c: tuple[tuple[str, float], ...]
) -> jax.Array:
  """Theta^0 (1 - c)^n, with c by kind: the rival to beat.

  The default c is what the authors' three networks do on average, and most of what they do.
  """
  del rate
  return history[-1] * (1.0 - dict(c)[leaf.kind]) ** steps


def average(history: History, leaf: Leaf, steps: int, rate: float) -> jax.Array:
  """The mean of the n + 1 newest weights: a step the other way."""
  del leaf, rate
  coefficients = np.full(steps + 1, 1.0 / (steps + 1))
  return _combine(history[-steps - 1 :], coefficients)


def least_squares(
  history: History,
  leaf: Leaf,
  steps: int,
  rate: float,
  *,
  coefficients: tuple[tuple[str, tuple[float, ...]], ...],
) -> jax.Array:
  """Theta^0 + sum_k a_k d_k + b Theta^0, sliding over its own predictions: the best linear KNOWN.

  d_0 .. d_(S-2) are the differences of the S newest stages, oldest first; the coefficients (a, b)
  of a kind of leaf minimise the squared error on the meta-dataset.
  """
  del rate
  step = jnp.asarray(dict(coefficients)[leaf.kind], history[-1].dtype)
  (moved,) = known_leaf.slide(lambda _: step, jnp.zeros((len(step),) * 2, step.dtype), (steps,))
  *older, newest = known_leaf.stage_coefficients(moved)
  stages = zip(older, history[-len(step) : -1], strict=True)
  return history[-1] * (1 + newest) + sum(c * (value - history[-1]) for c, value in stages)


def _tau(history: History, i: int) -> jax.Array:
  return history[-1] - history[-1 - i]


def _line(values: History, x: np.ndarray, at: float) -> jax.Array:
  """The least-squares line through (x, values), read at `at`; it is linear in the values."""
  centred = x - x.mean()
  return _combine(values, 1.0 / len(x) + (at - x.mean()) * centred / (centred**2).sum())


def _combine(values: History, coefficients: np.ndarray) -> jax.Array:
  # Coefficients sum to 1; summing differences from the newest keeps the small movement's digits.
  newest = values[-1]
  steps = zip(coefficients[:-1], values[:-1], strict=True)
  return newest + sum(float(c) * (value - newest) for c, value in steps)


# --- the registry -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
  """What `know_jax.predict` needs to know of a predictor.

  Attributes:
    leaf_fn: one of the functions above; None for those that run KNOWN.
    needs: (steps, options) -> the number of stages that the history must have, for steps >= 1.
    options: the options it takes, with their defaults.
    shipped: for those that run KNOWN, the name of the shipped parameters.
    history_free: whether KNOWN is fed copies of the newest weights.
  """

  leaf_fn: Callable[..., jax.Array] | None
  needs: Callable[[int, Mapping[str, Any]], int]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  shipped: str = ''
  history_free: bool = False


def _two_or_more(steps: int, options: Mapping[str, Any]) -> int:
  del steps, options
  return 2


def _one_more_than_steps(steps: int, options: Mapping[str, Any]) -> int:
  return 2 if options.get('variant') == 'two_point' else steps + 1


def _all_coefficients(steps: int, options: Mapping[str, Any]) -> int:
  del steps
  coefficients = options.get('coefficients')
  return max(len(c) for _, c in coefficients) if coefficients else HISTORY_LENGTH


def _one(steps: int, options: Mapping[str, Any]) -> int:
  del steps, options
  return 1


METHODS: dict[str, Method] = {
  'persistence': Method(persistence, _one),
  'linear_fit': Method(linear_fit, _two_or_more, {'regressor': 'size'}),
  'log_fit': Method(log_fit, _two_or_more),
  'exp_fit': Method(exp_fit, _two_or_more),
  'task_vector': Method(task_vector, _one_more_than_steps, {'lam': 1.0, 'variant': 'tau_n'}),
  'magmax': Method(magmax, _one_more_than_steps),
  'consensus_ta': Method(consensus_ta, _one_more_than_steps),
  'tsv': Method(tsv, _one_more_than_steps),
  'shrink': Method(shrink, _one, {'c': (('conv', 0.19), ('fc', 0.06), ('bias', 0.0))}),
  'average': Method(average, _one_more_than_steps),
  # None: the coefficients fitted on the meta-dataset.
  'least_squares': Method(least_squares, _all_coefficients, {'coefficients': None}),
  # The history that these need is in their parameters.
  'known': Method(None, _one, shipped='known'),
  'known_leaf': Method(None, _one, shipped='known_leaf'),
  'known_history_free': Method(None, _one, shipped='known', history_free=True),
  'known_leaf_history_free': Method(None, _one, shipped='known_leaf', history_free=True),
}

RENAMED = {'known_paper': 'known', 'known_paper_history_free': 'known_history_free'}
"""Old name -> new name of a predictor."""

_CHOICES = {'regressor': ('size', 'index'), 'variant': ('tau_n', 'two_point')}


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """The options of a predictor, defaults filled in, in a hashable form.

  Args:
    name: a key of `METHODS`.
    options: what the user gave.

  Returns:
    Option -> value.

  Raises:
    UserError: an unknown predictor or option, or a value that does not fit.
  """
  if isinstance(name, str) and name in RENAMED:
    raise UserError(f'predictor {name!r} is called {RENAMED[name]!r} now.')
  if not isinstance(name, str) or name not in METHODS:
    raise unknown_name('predictor', name, METHODS)
  known = METHODS[name].options
  for option, value in options.items():
    if option not in known:
      raise UserError(
        f'predictor {name!r} has no option {option!r}; it has {", ".join(known) or "none"}.'
      )
    if option in _CHOICES and value not in _CHOICES[option]:
      raise unknown_name(option, str(value), _CHOICES[option])
    if option == 'lam':
      _check_number(f'{name} option lam', value)
  checked = {**known, **options}
  if 'c' in options:
    checked['c'] = _by_kind(dict(known['c']), options['c'])
  if 'coefficients' in known:
    checked['coefficients'] = _coefficients(checked['coefficients'])
  return checked


def max_steps(predictor: str, history_length: int, **options: Any) -> int | None:
  """The largest step that a predictor can do with a history of this length; None: any."""
  options = check_options(predictor, options)
  needs = METHODS[predictor].needs
  if needs(1, options) == needs(2, options):
    return None
  return max(n for n in range(history_length + 1) if n == 0 or needs(n, options) <= history_length)


def check_used(known: str | None, network: str | None, predictors: Iterable[str]) -> None:
  """Checks that parameters of KNOWN that a user gives are those of a predictor that is asked for.

  Args:
    known: where they come from; None where none are given.
    network: whose they are, as `parameters.network_of` says.
    predictors: names in `METHODS`.

  Raises:
    UserError: no predictor takes them.
  """
  if known is not None and all(METHODS[name].shipped != network for name in predictors):
    raise UserError(
      f'{known} holds parameters of {network!r}; the predictors are {", ".join(predictors)}, of '
      'which none takes them.'
    )


def _coefficients(value: Any) -> tuple[tuple[str, tuple[float, ...]], ...]:
  """A mapping kind -> numbers, those of the differences and of the newest weight, made hashable."""
  value = least_squares_coefficients() if value is None else value
  try:
    given = {kind: tuple(float(number) for number in row) for kind, row in dict(value).items()}
  except (TypeError, ValueError) as error:
    raise UserError(
      f'least_squares option coefficients is {value!r}; wanted a mapping kind -> numbers.'
    ) from error
  lengths = {len(row) for row in given.values()}
  if set(given) != set(KINDS) or len(lengths) != 1 or lengths & {0, 1}:
    raise UserError(
      f'least_squares option coefficients has { ({k: len(v) for k, v in given.items()}) } numbers; '
      f'wanted S of them, the same S of at least 2, for each of {", ".join(KINDS)}.'
    )
  for kind, row in given.items():
    for number in row:
      _check_number(f'least_squares option coefficients[{kind!r}]', number)
  return tuple((kind, given[kind]) for kind in KINDS)


def _by_kind(defaults: dict[str, float], value: Any) -> tuple[tuple[str, float], ...]:
  """One number for all kinds, or a mapping kind -> number that overrides the defaults."""
  try:
    given = dict(value) if isinstance(value, Mapping | tuple) else dict.fromkeys(KINDS, value)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'shrink option c is {value!r}; wanted a number, or a mapping kind -> number.'
    ) from error
  for kind, number in given.items():
    if kind not in KINDS:
      raise unknown_name('kind in shrink option c', str(kind), KINDS)
    _check_number(f'shrink option c[{kind!r}]', number)
  return tuple((defaults | given).items())


def _check_number(what: str, value: Any) -> None:
  if not isinstance(value, numbers.Real) or not math.isfinite(value):
    raise UserError(f'{what} is {value!r}; wanted a finite Python number.')
