"""Networks of any library as one sort of object: `Model`, and its makers for Flax linen and NNX."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
from flax import nnx as flax_nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from know_jax.errors import UserError

Variables = dict[str, Any]
"""Collection -> pytree: 'params', and whatever else the network has, such as 'batch_stats'."""


class Model(Protocol):
  """A network: pure functions of its variables. It must be hashable: compiled steps are kept by it.

  All randomness comes from `key`. A collection that is there after `init` is trained, saved and
  transferred with the rest; collections are nested dicts of arrays.
  """

  def __hash__(self) -> int: ...

  def init(self, key: jax.Array, batch: Mapping[str, Any]) -> Variables:
    """Fresh variables; of the batch, as `prepare` gives it, only shapes and dtypes count."""
    ...

  def apply(
    self, variables: Variables, batch: Mapping[str, Any], *, train: bool, key: jax.Array | None
  ) -> tuple[Any, Variables]:
    """The outputs for a batch, and the collections that this changed: none where not `train`."""
    ...


def linen(module: nn.Module, inputs: tuple[str, ...] = ('image',)) -> Model:
  """A Flax linen module as a `Model`.

  Args:
    module: called as `module(*[batch[name] for name in inputs])`, with `train=` or
      `deterministic=`, if its `__call__` takes one of them. Every stream of randomness
      (`'dropout'` and others) follows from the key. BatchNorm averages over devices if its
      `axis_name` is `know_jax.tasks.base.AXIS`, also as an attribute `axis_name` of the module.
    inputs: which arrays of a batch it takes, in this order.
  """
  if not isinstance(module, nn.Module):
    raise UserError(f'linen was given {type(module)}; expected an instance of flax.linen.Module.')
  return _Linen(module, tuple(inputs))


def nnx(
  make: Callable[[flax_nnx.Rngs], flax_nnx.Module], inputs: tuple[str, ...] = ('image',)
) -> Model:
  """A Flax NNX module as a `Model`.

  Args:
    make: makes the module, as `lambda rngs: Net(rngs=rngs)`. The module is called as
      `module(*[batch[name] for name in inputs])` after `module.train()` or `module.eval()`.
    inputs: which arrays of a batch it takes, in this order.

  Returns:
    The model. Its collections are named by the types of NNX variables: 'params' (`nnx.Param`),
    'batch_stats' (`nnx.BatchStat`) and so on; the state of random streams is none of them.
  """
  if not callable(make):
    raise UserError(f'nnx was given {type(make)}; expected a function of nnx.Rngs.')
  return _NNX(make, tuple(inputs))


def _inputs(batch: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
  if missing := [name for name in names if name not in batch]:
    raise UserError(
      f'the network takes {missing[0]!r}, which a batch lacks; it has {", ".join(sorted(batch))}.'
    )
  return [batch[name] for name in names]


def _mode(call: Callable[..., Any], train: bool) -> dict[str, bool]:
  """The argument that tells a module whether it is trained, if it takes one."""
  parameters = inspect.signature(call).parameters
  for name, value in (('train', train), ('training', train), ('deterministic', not train)):
    if name in parameters:
      return {name: value}
  return {}


@functools.lru_cache(maxsize=64)
def _initialiser(module: nn.Module) -> Callable[..., Any]:
  """`module.init` as one program: compiled operation by operation it takes ten times as long."""
  mode: dict[str, Any] = _mode(module.__call__, False)
  return jax.jit(functools.partial(module.init, **mode))


@dataclasses.dataclass(frozen=True)
class _Linen:
  module: nn.Module
  inputs: tuple[str, ...]

  def init(self, key: jax.Array, batch: Mapping[str, Any]) -> Variables:
    return dict(_initialiser(self.module)(key, *_inputs(batch, self.inputs)))

  def apply(
    self, variables: Variables, batch: Mapping[str, Any], *, train: bool, key: jax.Array | None
  ) -> tuple[Any, Variables]:
    module = self.module
    axis = getattr(module, 'axis_name', None)
    if axis is not None and not _is_mapped(axis):
      # One device sees the whole batch.
      module = module.clone(axis_name=None)
    arrays = _inputs(batch, self.inputs)
    options: dict[str, Any] = _mode(module.__call__, train)
    if key is not None:
      # Streams of other names take the key of 'params'.
      options['rngs'] = {'dropout': key, 'params': jax.random.fold_in(key, 1)}
    changing = [name for name in variables if name != 'params']
    if not train or not changing:
      return module.apply(variables, *arrays, **options), {}
    outputs, changed = module.apply(variables, *arrays, mutable=changing, **options)
    return outputs, dict(changed)


def _is_mapped(axis: str) -> bool:
  try:
    jax.lax.axis_index(axis)
  except NameError:
    return False
  return True


@dataclasses.dataclass(frozen=True)
class _NNX:
  make: Callable[[flax_nnx.Rngs], flax_nnx.Module]
  inputs: tuple[str, ...]

  @functools.cached_property
  def _parts(self) -> tuple[Any, dict[tuple, Any]]:
    """The module without its arrays, and the type of every variable."""
    graph, state = flax_nnx.split(flax_nnx.eval_shape(lambda: self.make(flax_nnx.Rngs(0))))
    return graph, dict(flax_nnx.to_flat_state(state))

  def init(self, key: jax.Array, batch: Mapping[str, Any]) -> Variables:
    return self._made(key)

  @functools.cached_property
  def _made(self) -> Callable[[jax.Array], Variables]:
    # One program, as of linen's.
    return jax.jit(lambda key: self._variables(flax_nnx.state(self.make(flax_nnx.Rngs(key)))))

  def _variables(self, state: Any) -> Variables:
    flat: dict[tuple[str, ...], Any] = {}
    for path, variable in flax_nnx.to_flat_state(state):
      if not isinstance(variable, flax_nnx.RngState):
        collection = flax_nnx.variable_name_from_type(type(variable))
        flat[collection, *map(str, path)] = variable.get_value()
    return unflatten_dict(flat)

  def apply(
    self, variables: Variables, batch: Mapping[str, Any], *, train: bool, key: jax.Array | None
  ) -> tuple[Any, Variables]:
    graph, like = self._parts
    named, state, streams = flatten_dict(variables), {}, 0
    for path, variable in like.items():
      if isinstance(variable, flax_nnx.RngKey):
        given = jax.random.key(0) if key is None else key
        value, streams = jax.random.fold_in(given, streams), streams + 1
      elif isinstance(variable, flax_nnx.RngCount):
        value = jax.numpy.zeros((), variable.get_value().dtype)
      else:
        value = named[(flax_nnx.variable_name_from_type(type(variable)), *map(str, path))]
      state[path] = variable.replace(value)
    module = flax_nnx.merge(graph, flax_nnx.from_flat_state(state))
    module.train() if train else module.eval()
    outputs = module(*_inputs(batch, self.inputs))
    if not train:
      return outputs, {}
    changed = self._variables(flax_nnx.state(module))
    return outputs, {name: changed[name] for name in variables if name != 'params'}
