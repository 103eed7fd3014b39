"""predict and forecast: the entry points."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.nowcast.history import check_finite
from know_jax.nowcast.plan import check_steps, plan_of
from know_jax.predictors.registry import REGISTRY
from know_jax.trajectory import Trajectory


def predict(
  params_history: Any,
  steps: int = 1,
  *,
  predictor: Any = 'known',
  theta: Any = None,
  rate: float = 0.5,
  kinds: kinds_.Rules | None = None,
  stacked: str | None = None,
  on_bad: str = 'keep',
  **options: Any,
) -> trees.PyTree:
  """Predicts the weights `steps` stages beyond the newest: "as if trained on" rate^-steps the data.

  A pure function of arrays: works under `jit` (with `steps`, `predictor`, `rate`, `kinds` and
  options static), `grad` (for the history and theta) and `vmap`. Leaves sharded by a
  `NamedSharding` keep their sharding, and KNOWN moves no weight between devices, be they of one
  process or of several (each then calls this, with its part of the same arrays); under a `jit` of
  the caller's over a mesh with automatic axes XLA decides both. bfloat16 and float16 are computed
  in float32 and returned in their own dtype.

  Every predicted leaf is checked (`know_jax.nowcast.health`): it is bad if it holds NaN or
  infinity, if a weight moves farther than ten times the largest weight of its history, or if a
  residual of the paper's KNOWN is saturated. Leaves unlike any that KNOWN was trained on are
  predicted, with a warning.

  Args:
    params_history: the weights at T stages, oldest (smallest subset) first: any sequence of
      pytrees, a `Trajectory`, or one pytree whose leaves are stacked on axis 0 (`[T, ...]`). KNOWN
      reads the S newest stages, S = 5 for the shipped weights.
    steps: how far ahead; 0 gives the newest weights, bit for bit.
    predictor: a name in `PREDICTORS`; one of your own as an object (see
      `know_jax.predictors.base`), or as 'package.module:object'.
    theta: the parameters of KNOWN, as `load_known` gives them; None: those shipped. Only for the
      predictors that have parameters, `known`, `known_leaf` and both without history.
    rate: r, the sampling rate of the stages, in (0, 1); for the predictors that fit against size,
      and for KNOWN conditioned on the leaf.
    kinds: what the names of leaves do not tell, or tell wrongly: a mapping from regular expressions
      to 'conv', 'fc', 'bias' or 'keep', for paths joined by `/` (`know_jax.kinds` says which leaves
      a rule touches), or a function `(path, leaf) -> kind or None`, `leaf` a
      `jax.ShapeDtypeStruct` without the time axis.
    stacked: a regular expression for the paths of leaves that hold layers, or copies for devices,
      on their first axis: `'layers/'`. Each is predicted as if it were a leaf of its own.
    on_bad: what becomes of a bad leaf: 'keep' (it keeps its newest weights, and a
      `health.PredictionWarning` says so and why), 'raise', or 'ignore' (nothing is checked, and
      no warning given). The same under a transformation, where the warning comes, and the error is
      raised, when the computation runs.
    **options: the predictor's own options: `regressor` (linear_fit), `lam` and `variant`
      (task_vector), `c` (shrink), `coefficients` (least_squares).

  Returns:
    A pytree like one element of the history: same structure, shapes and dtypes; PyTorch tensors for
    PyTorch tensors. Kept leaves are those of the newest stage, the very objects: normalisation,
    statistics, embeddings, an optimizer's state, integers, functions, Python numbers. They are not
    checked, and may differ between stages. Those that one may expect to be predicted are named in a
    `KindsWarning`.

  Raises:
    UserError: before anything is computed, if the history is too short for the step, its stages
      differ, it holds NaN or infinity (not checked under a transformation, nor in kept leaves; seen
      while they are combined by linear predictors), leaves have no kind or lie on other devices
      than the rest, or a name or option is unknown; afterwards, if a prediction is bad and `on_bad`
      is 'raise'.
  """
  steps = check_steps(steps, least=0)
  plan = plan_of(params_history, steps, predictor, theta, rate, kinds, on_bad, options, stacked)
  if steps == 0:
    check_finite(plan.history)
    return plan.history.newest()
  return plan.history.rebuild(plan.run((steps,), times=False))


def forecast(
  params_history: Any,
  steps: int = 3,
  *,
  predictor: Any = 'known',
  theta: Any = None,
  rate: float = 0.5,
  kinds: kinds_.Rules | None = None,
  stacked: str | None = None,
  on_bad: str = 'keep',
  **options: Any,
) -> Trajectory:
  """Predicts each of the next `steps` weights; the arguments are those of `predict`.

  Returns:
    A `Trajectory` of `steps` stages, the nearest prediction first; stage n - 1 equals
    `predict(params_history, n, ...)`.

  Raises:
    UserError: as `predict` does; also for steps = 0.
  """
  steps = check_steps(steps, least=1)
  plan = plan_of(params_history, steps, predictor, theta, rate, kinds, on_bad, options, stacked)
  return Trajectory(plan.history.rebuild(plan.run(tuple(range(1, steps + 1))), steps))


class _Predictors(Mapping[str, Callable[..., trees.PyTree]]):
  """The registered predictors, those of the user's included."""

  def __getitem__(self, name: str) -> Callable[..., trees.PyTree]:
    REGISTRY[name]
    return functools.partial(predict, predictor=name)

  def __iter__(self) -> Iterator[str]:
    return iter(REGISTRY)

  def __len__(self) -> int:
    return len(REGISTRY)


PREDICTORS: Mapping[str, Callable[..., trees.PyTree]] = _Predictors()
"""Name -> `(params_history, steps=1, *, rate=0.5, kinds=None, **options) -> pytree`."""
