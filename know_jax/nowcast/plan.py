"""What a prediction is made of, checked before anything is computed."""

import contextlib
import dataclasses
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from know_jax import kinds as kinds_
from know_jax.errors import UserError
from know_jax.nowcast import chunks, compiled
from know_jax.nowcast import health as health_
from know_jax.nowcast.history import History, check_finite, read_history
from know_jax.nowcast.job import Job
from know_jax.predictors.base import Leaf, Linear, max_steps
from know_jax.predictors.registry import resolve


def check_steps(steps: Any, least: int) -> int:
  """A number of steps as an integer.

  Raises:
    UserError: it is none, or less than `least`.
  """
  try:
    steps = operator.index(steps)
  except TypeError as error:
    raise UserError(
      f'steps is {steps!r}; expected a Python integer of at least {least}.'
    ) from error
  if steps < least:
    raise UserError(f'steps is {steps}; expected at least {least}.')
  return steps


def multiple_of(rate: float, steps: int) -> float:
  """r^-n, how many times the data a prediction stands for.

  Raises:
    UserError: more than a float can hold.
  """
  try:
    return rate**-steps
  except OverflowError as error:
    raise UserError(
      f'steps is {steps}; expected fewer: at rate {rate:g} it stands for more than 1e308 times the '
      'data.'
    ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
  """A prediction that has been checked; `run` carries it out."""

  history: History  # The leaves that are predicted, and what is kept.
  job: Job  # What is done to them.
  theta: Any  # Kind -> parameters, None for predictors without.

  def run(self, steps: tuple[int, ...], *, times: bool = True) -> list[Any]:
    """The predictions of the history's leaves, checked.

    Args:
      steps: the steps that are asked for.
      times: whether they are given on the first axis, `[len(steps), ...]`; else there is one step.

    Raises:
      UserError: the history holds NaN or infinity, or a prediction is bad and that is an error.
    """
    predicted = self.history.leaves
    on_host = is_on_host(predicted, self.theta)
    # Linear predictors take little longer than a reading of their stages, and see it on the way.
    if not (on_host and isinstance(self.job.predictor, Linear)):
      check_finite(self.history)
    if on_host:
      # Now, also where the caller is traced and the history is a constant of the trace. Elsewhere
      # it would have every small operation compiled.
      with jax.core.eval_context() if is_traced() else contextlib.nullcontext():
        arrays, health = chunks.predict_leaves(predicted, self.theta, self.job, steps)
        if arrays is None:
          check_finite(self.history)
        assert arrays is not None
        result = as_jax(arrays if times else [array[0] for array in arrays])
    else:
      _check_devices(predicted, self.job)
      result, health = compiled.predict_leaves(predicted, self.theta, self.job, steps)
      result = result if times else [leaf[0] for leaf in result]
    if health is not None:
      about: dict[str, Any] = {
        'predictor': self.job.name,
        'leaves': tuple((leaf.path, leaf.kind) for leaf in self.job.leaves),
        'steps': steps,
        'on_bad': self.job.on_bad,
      }
      if isinstance(health, jax.core.Tracer):
        health_.report_traced(health, **about)
      else:
        health_.report(health, **about, stacklevel=3)
    return result


def as_jax(arrays: Any) -> Any:
  """NumPy arrays that nobody changes any more as JAX's, without a copy or a compilation."""
  return jax.device_put(arrays, may_alias=True)


def is_traced() -> bool:
  """Whether operations are recorded now, and not done."""
  return isinstance(jnp.add(0, 0), jax.core.Tracer)


def is_on_host(leaves: list[Any], theta: Any) -> bool:
  """Whether all arrays are at hand in the memory of this machine, and none is traced."""
  for array in jax.tree.leaves((leaves, theta)):
    if isinstance(array, jax.core.Tracer):
      return False
    if isinstance(array, jax.Array):
      device, *others = array.devices()
      if others or device.platform != 'cpu':
        return False
  return True


def _check_devices(leaves: list[Any], job: Job) -> None:
  """Raises where leaves are bound to different devices; to none are traced and NumPy arrays."""
  bound: dict[frozenset[jax.Device], str] = {}
  for leaf, info in zip(leaves, job.leaves, strict=True):
    for array in jax.tree.leaves(leaf):
      if isinstance(array, jax.core.Tracer) or not getattr(array, 'committed', False):
        continue
      bound.setdefault(frozenset(array.devices()), info.path)
      if len(bound) > 1:
        (first, other), (where, there) = bound.values(), map(_named_devices, bound)
        raise UserError(
          f'leaf {other!r} lies on {there}, and {first!r} on {where}; expected the same devices '
          'for all leaves.'
        )


def _named_devices(devices: frozenset[jax.Device]) -> str:
  names = sorted(str(device) for device in devices)
  return names[0] if len(names) == 1 else f'{len(names)} devices ({names[0]}, ...)'


def plan_of(
  params_history: Any,
  steps: int,
  predictor: Any,
  theta: Any,
  rate: float,
  kinds: kinds_.Rules | None,
  on_bad: str,
  options: dict[str, Any],
  stacked: str | None = None,
) -> Plan:
  """Checks everything that `predict` checks, and computes nothing.

  The arguments are those of `predict`.

  Raises:
    UserError: as `predict` does before it computes.
  """
  health_.check_on_bad(on_bad)
  name, made = resolve(predictor, options)
  if not isinstance(rate, numbers.Real) or not 0 < rate < 1:
    raise UserError(f'rate is {rate!r}; expected a Python number in (0, 1).')
  history = read_history(params_history, kinds, stacked)
  result = set(history.kinds)
  made, theta = checked_theta(name, made, theta, result, steps)
  check_length(name, made, steps, history.length, theta, result)
  job = Job(
    name=name,
    predictor=made,
    leaves=tuple(map(Leaf, history.paths, history.kinds)),
    shardings=tuple(map(_sharding, history.leaves)),
    rate=float(rate),
    on_bad=on_bad,
  )
  return Plan(history, job, theta)


def checked_theta(
  name: str, predictor: Any, theta: Any, kinds: set[str], steps: int
) -> tuple[Any, Any]:
  """The predictor that runs, and its parameters.

  Args:
    name: of the predictor.
    predictor: it.
    theta: what the caller gave, None for the predictor's own.
    kinds: those of the leaves.
    steps: how far; for 0 none are needed.

  Raises:
    UserError: it takes none, or others.
  """
  if not predictor.takes_theta:
    if theta is not None:
      raise UserError(f'theta is for the predictors that run KNOWN; {name!r} takes none.')
    return predictor, None
  if not (theta is None or isinstance(theta, Mapping)):
    raise UserError(f'theta is {theta!r}; expected a mapping of kinds to parameters.')
  if steps:
    theta = predictor.default_theta() if theta is None else theta
    predictor.check_theta(theta, kinds)
    if kinds:
      predictor = predictor.for_theta({kind: theta[kind] for kind in kinds})
  return predictor, theta


def check_length(
  name: str, predictor: Any, steps: int, length: int, theta: Any, kinds: set[str]
) -> None:
  """Raises a `UserError` where a history of this length is too short for the step."""
  if steps == 0:
    return
  params = [predictor.params(kind, theta) for kind in sorted(kinds)]
  needed = max((predictor.stages(steps, p) for p in params), default=1)
  if length >= needed:
    return
  reach = max_steps(predictor, length)
  at_most = f'; with this history it can do at most steps={reach}' if reach else ''
  raise UserError(
    f'predictor {name!r} needs a history of {needed} stages for steps={steps}; found {length}'
    f'{at_most}.'
  )


def _sharding(leaf: Any) -> NamedSharding | None:
  """The sharding that all stages of a leaf share, if it spans devices and spares the time axis."""
  if isinstance(leaf, np.ndarray) or (isinstance(leaf, tuple) and isinstance(leaf[0], np.ndarray)):
    return None
  shardings = [_array_sharding(part) for part in jax.tree.leaves(leaf)]
  sharding = shardings[0]
  if sharding is None or any(other != sharding for other in shardings):
    return None
  if isinstance(leaf, tuple):
    return sharding
  time, *rest = (*sharding.spec, None) if not sharding.spec else sharding.spec
  return NamedSharding(sharding.mesh, PartitionSpec(*rest)) if time is None else None


def _array_sharding(array: Any) -> NamedSharding | None:
  sharding: Any = None
  if isinstance(array, jax.core.Tracer):
    # A traced array shows its sharding only where the axes of the mesh are explicit.
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.are_all_axes_explicit:
      return None
  elif isinstance(array, jax.Array):
    sharding = array.sharding
  return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
