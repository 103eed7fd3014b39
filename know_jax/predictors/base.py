"""What a predictor is: one of three capabilities, a frozen dataclass whose fields are its options.

  Linear       one combination of the stages for all weights of a leaf: `coefficients`
  Elementwise  every weight from its own history: `predict` of `[S, N]`
  WholeLeaf    a leaf from its history as a whole: `predict` of a list of arrays

The engines (`know_jax.nowcast`) ask the object for all that they need; none knows a predictor by
its name. To add one, subclass a capability; `know_jax.predict(history, predictor=Mine(strength=2))`
takes it as it is, and `know_jax.register_predictor` gives it a name:

    @dataclasses.dataclass(frozen=True)
    class Mine(know_jax.Linear):  # Theta^0 + strength n (Theta^0 - Theta^1)

      strength: float = 1.0

      def stages(self, steps, params):
        return 2

      def coefficients(self, stages, moments, params, rate, steps):
        return np.array([[-self.strength * n, 0.0] for n in steps])

Notation: Theta^0 is the newest weight, Theta^i the one i stages older (trained on r^i of the data),
tau_i = Theta^0 - Theta^i, n the step: Theta^-n is predicted, the weight "as if trained on" r^-n
times the data.
"""

import dataclasses
import inspect
import math
import numbers
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax

from know_jax.errors import UserError, unknown_name
from know_jax.kinds import KINDS


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What a predictor of whole leaves may know of one beside its history.

  Attributes:
    path: the keys joined by `/`.
    kind: 'conv', 'fc' or 'bias'.
  """

  path: str
  kind: str


class Predictor:
  """What the engines ask of any predictor; subclass a capability, not this.

  Attributes:
    keeps_unmoved: whether a leaf that is equal at all stages comes back bit for bit.
    reads_all: whether all stages are read, and not only the newest `stages(...)`.
    takes_theta: whether it has parameters, as KNOWN has.
    saturates: whether its steps end at 1, so that one near it says only that it is large.
    needs_moments: whether it reads the second moments of the leaf, `[S, S]`: the mean of v v^T over
      its weights with v = (d_0, ..., d_(S-2), Theta^0), the differences from stage to stage, oldest
      first.
  """

  keeps_unmoved: ClassVar[bool] = True
  reads_all: ClassVar[bool] = False
  takes_theta: ClassVar[bool] = False
  saturates: ClassVar[bool] = False
  needs_moments: ClassVar[bool] = False

  def stages(self, steps: int, params: Any) -> int:
    """How many of the newest stages a prediction of so many steps needs, at least 1."""
    return 1

  def default_theta(self) -> Mapping[str, Any] | None:
    """Kind -> parameters where the caller gives none; only asked where `takes_theta`."""
    return None

  @property
  def theta_name(self) -> str:
    """What the default parameters are called."""
    return type(self).__name__

  def check_theta(self, theta: Any, kinds: set[str]) -> None:
    """Checks parameters for leaves of these kinds.

    Raises:
      UserError: they are of another form.
    """
    if missing := sorted(kinds - set(theta)):
      raise UserError(
        f'theta has no parameters for leaves of kind {missing[0]!r}; it has {sorted(theta)}.'
      )

  def accepts(self, network: str) -> bool:
    """Whether it runs a network of KNOWN of this name, as `parameters.network_of` tells it."""
    return False

  def params(self, kind: str, theta: Any) -> Any:
    """The parameters for leaves of one kind: those of theta, or from the options."""
    return None if theta is None else theta[kind]

  def for_theta(self, theta: Any) -> 'Predictor':
    """The predictor that these parameters are for, where they decide on more than numbers."""
    return self


class Linear(Predictor):
  """Predicts a leaf by one linear combination of its stages."""

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> Any:
    """The coefficients of the stages: `[len(steps), stages]`.

    Theta^-n = Theta^0 + sum_i c_i (Theta^i - Theta^0) + c_0 Theta^0, oldest first and c_0 last:
    differences keep the digits of a small movement.

    Args:
      stages: S, the number of newest stages that are read.
      moments: of the leaf, `[S, S]`, see `Predictor`; None where it does not read them. With them
        this is vectorised over leaves and compiled: use `jax.numpy`.
      params: of the leaf's kind, see `Predictor.params`.
      rate: r.
      steps: the steps n, ascending.
    """
    raise NotImplementedError

  def outside(self, moments: Any, params: Any, rate: float) -> Any:
    """How many times the limit a leaf is unlike what the parameters saw, a scalar; 0: unknown."""
    return 0.0


class Elementwise(Predictor):
  """Predicts every weight from its own history.

  Where it reads the leaf's moments, `of_leaf` says what of them all weights of the leaf are told,
  and `predict` is given that as one more argument, the last: `[F, N]`, or `[F, 1]` for all.
  """

  def of_leaf(self, moments: jax.Array, params: Any) -> jax.Array:
    """What every weight of a leaf is told of it, by `jax.numpy`: `[F]`.

    Args:
      moments: of the leaf, `[S, S]`, see `Predictor`.
      params: of the leaf's kind.
    """
    raise NotImplementedError

  def prepare(self, params: Any) -> Any:
    """What `predict` takes as parameters: made once, before many stretches of weights."""
    return params

  def predict(
    self, history: jax.Array, params: Any, rate: float, steps: tuple[int, ...]
  ) -> jax.Array:
    """The predictions of a stretch of weights: `[len(steps), N]`, by `jax.numpy`.

    Args:
      history: `[S, N]`, oldest stage first.
      params: as `prepare` gives them.
      rate: r.
      steps: the steps n, ascending.
    """
    raise NotImplementedError


class WholeLeaf(Predictor):
  """Predicts a leaf from its history as a whole."""

  copies: ClassVar[int] = 16
  """How many copies of a leaf in float32 it takes beside the stages and predictions."""

  def predict(
    self, history: Sequence[jax.Array], leaf: Leaf, params: Any, rate: float, steps: int
  ) -> jax.Array:
    """The prediction of one leaf `steps` ahead, `[...]`, by `jax.numpy`.

    Args:
      history: the stages `[...]`, oldest first.
      leaf: its path and kind.
      params: of the leaf's kind.
      rate: r.
      steps: n.
    """
    raise NotImplementedError

  def alike(self, leaf: Leaf) -> Leaf:
    """The leaf that `predict` is given for it, as for others that it predicts in the same way.

    What is predicted on the host is compiled once for each such leaf and shape. By default each
    leaf is its own, as `predict` may read any of its path.
    """
    return leaf

  def is_whole(self, leaf: Leaf, shape: tuple[int, ...]) -> bool:
    """Whether a leaf must be there as a whole; if not, any stretch of it may stand for it."""
    return True


CAPABILITIES = (Linear, Elementwise, WholeLeaf)


def check_predictor(entry: Any, what: str) -> None:
  """Checks that something is a predictor: an object or a class of one of the capabilities.

  Raises:
    UserError: it is not, lacks its method, or cannot be hashed, as what is compiled for must be.
  """
  is_class = isinstance(entry, type)
  if not (issubclass(entry, CAPABILITIES) if is_class else isinstance(entry, CAPABILITIES)):
    raise UserError(
      f'{what} is {entry!r}; expected a know_jax.Linear, Elementwise or WholeLeaf, a name of '
      "PREDICTORS, or 'package.module:object'."
    )
  try:
    hash(entry)
  except TypeError as error:
    raise UserError(
      f'{what} is a {type(entry).__name__}, which cannot be hashed ({error}); make it a '
      '@dataclasses.dataclass(frozen=True) with options that can.'
    ) from error
  cls = entry if is_class else type(entry)
  for capability, method in zip(CAPABILITIES, ('coefficients', 'predict', 'predict'), strict=True):
    if issubclass(cls, capability) and getattr(cls, method) is getattr(capability, method):
      raise UserError(
        f'{what} is a {cls.__name__} without a method {method!r}; expected one, as of every '
        f'{capability.__name__}.'
      )


def make(name: str, entry: Any, options: Mapping[str, Any]) -> Any:
  """A predictor with options, which are read from the signature of its class.

  Args:
    name: what it is called in errors.
    entry: a predictor, which has its options already, or its class.
    options: what the user gave.

  Raises:
    UserError: an option is unknown, or its value does not fit.
  """
  fields = inspect.signature(entry).parameters if isinstance(entry, type) else {}
  hints = typing.get_type_hints(entry) if fields else {}
  for option, value in options.items():
    if option not in fields:
      raise UserError(
        f'predictor {name!r} has no option {option!r}; it has {", ".join(fields) or "none"}.'
      )
    hint = hints.get(option)
    if typing.get_origin(hint) is Literal:
      if value not in typing.get_args(hint):
        raise unknown_name(option, str(value), typing.get_args(hint))
    elif hint in (int, float):
      check_number(f'{name} option {option}', value, integer=hint is int)
  if not isinstance(entry, type):
    return entry
  try:
    result = entry(**options)
  except TypeError as error:
    raise UserError(f'predictor {name!r}: {error}.') from error
  check_predictor(result, f'predictor {name!r}')
  return result


def check_number(what: str, value: Any, *, integer: bool = False) -> None:
  """Raises a `UserError` where a value is no finite Python number."""
  sort = numbers.Integral if integer else numbers.Real
  if not isinstance(value, sort) or not math.isfinite(value):
    noun = 'integer' if integer else 'number'
    raise UserError(f'{what} is {value!r}; expected a finite Python {noun}.')


def by_kind(what: str, defaults: Mapping[str, float], value: Any) -> tuple[tuple[str, float], ...]:
  """One number for all kinds, or a mapping kind -> number that overrides the defaults.

  Args:
    what: the option's name, for errors.
    defaults: kind -> number.
    value: what the user gave; a tuple of pairs is read as a mapping.

  Returns:
    Pairs of kind and number, which can be hashed.
  """
  try:
    given = dict(value) if isinstance(value, Mapping | tuple) else dict.fromkeys(KINDS, value)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'{what} is {value!r}; expected a number, or a mapping kind -> number.'
    ) from error
  for kind, number in given.items():
    if kind not in KINDS:
      raise unknown_name(f'kind in {what}', str(kind), KINDS)
    check_number(f'{what}[{kind!r}]', number)
  return tuple({**defaults, **given}.items())


def check_shape(predictor: Predictor, what: str, found: Any, expected: tuple[int, ...]) -> Any:
  """What a predictor gave, if it has the shape that it must have.

  Raises:
    UserError: it has another.
  """
  if (shape := getattr(found, 'shape', None)) != expected:
    raise UserError(
      f'{type(predictor).__name__} gave {what} of shape {shape}; expected {expected}.'
    )
  return found


def max_steps(predictor: Predictor, history_length: int) -> int | None:
  """The largest step that a predictor can do with a history of this length; None: any."""
  theta = predictor.default_theta() if predictor.takes_theta else None
  params = predictor.params(KINDS[0], theta)
  if predictor.stages(1, params) == predictor.stages(2, params):
    return None
  steps = range(1, history_length + 1)
  return max((n for n in steps if predictor.stages(n, params) <= history_length), default=0)
