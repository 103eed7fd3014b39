"""A history of weights in one form, checked: what is predicted apart from what is kept."""

import collections.abc
import concurrent.futures
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError, warn
from know_jax.nowcast.pieces import sums_finite
from know_jax.system.machine import processors
from know_jax.trajectory import Trajectory, stacked_length

_STRETCH = 1 << 20  # Weights whose finiteness is checked at a time: their mask stays small.


@dataclasses.dataclass(frozen=True)
class _Part:
  """A leaf of the history, or one of its layers, or its real or imaginary part."""

  leaf: int
  layer: int | None = None
  half: str = ''

  def of(self, array: Any, axis: int) -> Any:
    """The part of a leaf's array, whose layers are on `axis`."""
    if self.layer is not None:
      array = array[(slice(None),) * axis + (self.layer,)]
    return getattr(array, self.half) if self.half else array


@dataclasses.dataclass(frozen=True)
class History:
  """A history, whatever form it was given in.

  The lists have an entry for each leaf that is predicted. A stack of layers is one leaf for each
  layer here, and a complex leaf two real ones.

  Attributes:
    leaves: for every leaf either a tuple of T arrays or one array `[T, ...]`, oldest first.
    structs: for every leaf its shape and dtype without the time axis.
    paths: its path, with the layer in brackets.
    kinds: its kind.
    length: T.
  """

  leaves: list[Any]
  structs: list[jax.ShapeDtypeStruct]
  paths: list[str]
  kinds: list[str]
  length: int
  _parts: list[_Part]
  _given: list[Any]
  _is_stacked: bool
  _treedef: Any

  def newest(self) -> trees.PyTree:
    """The newest stage: the very leaves that were given."""
    return jax.tree.unflatten(self._treedef, map(self._newest, self._given))

  def _newest(self, leaf: Any) -> Any:
    return _last(leaf) if self._is_stacked else leaf

  def rebuild(self, predicted: Sequence[Any], times: int | None = None) -> trees.PyTree:
    """A tree like one stage, of these predictions of `leaves`; kept leaves are the newest.

    Args:
      predicted: for every leaf `[...]`, or `[times, ...]`.
      times: how many stages the tree has on the first axis of its leaves; None for one without.
    """
    axis = 0 if times is None else 1
    done = {}
    for leaf, members in itertools.groupby(range(len(predicted)), lambda i: self._parts[i].leaf):
      whole = _joined([(self._parts[i], predicted[i]) for i in members], axis)
      done[leaf] = _like(self._given[leaf], whole)
    leaves = []
    for i, given in enumerate(self._given):
      if i in done:
        leaves.append(done[i])
      else:
        newest = self._newest(given)
        leaves.append(newest if times is None else _repeated(newest, times))
    return jax.tree.unflatten(self._treedef, leaves)


def read_history(
  params_history: Any, kinds: kinds_.Rules | None = None, stacked: str | None = None
) -> History:
  """A history in any of the forms that `predict` takes; warns of what is kept unexpectedly.

  Args:
    params_history: as `predict` takes it.
    kinds: as in `kinds.find_kinds`.
    stacked: as in `kinds.find_kinds`.

  Raises:
    UserError: leaves that are predicted differ between stages or have no kind, there are no
      leaves, or JAX would narrow one in silence.
  """
  stages = _stages(params_history)
  try:
    return _read(params_history, stages, kinds, stacked)
  except UserError as error:
    if stages is None or not _may_be_stacked(stages):
      raise
    raise UserError(
      f'{error} If this is one pytree that is a {type(params_history).__name__}, with the stages '
      'on axis 0 of its leaves, give Trajectory(history).'
    ) from error


def _may_be_stacked(stages: Sequence[trees.PyTree]) -> bool:
  """Whether what was taken for a list of stages may be one tree of stacked leaves."""
  leaves = [leaf for leaf in jax.tree.leaves(stages) if trees.is_array(leaf)]
  lengths = {leaf.shape[0] if leaf.shape else 1 for leaf in leaves}
  return len(lengths) == 1 and lengths != {1}


def _read(
  params_history: Any,
  stages: list[trees.PyTree] | None,
  kinds: kinds_.Rules | None,
  stacked: str | None,
) -> History:
  if stages is not None:
    newest, length = stages[-1], len(stages)
  else:
    is_trajectory = isinstance(params_history, Trajectory)
    newest = params_history.weights if is_trajectory else params_history
    length = stacked_length(newest)
  flat, treedef = jax.tree.flatten(newest, is_leaf=trees.is_state)
  if not flat:
    raise UserError('the history has no leaves; expected pytrees of weights.')
  named = trees.named_leaves(newest, is_leaf=trees.is_state)
  axes = 1 if stages is None else 0
  structs = {path: _struct(leaf, axes) for path, leaf in named.items()}
  result = kinds_.find_kinds(structs, kinds, stacked)
  for note in result.notes:
    warn(note)
  # There is nothing to predict in a leaf without weights.
  predicted = {
    path: i
    for i, path in enumerate(named)
    if result.of[path] != kinds_.KEEP and 0 not in structs[path].shape
  }
  for path in predicted:
    _check_dtype(path, structs[path].dtype)
  columns: dict[str, Any] = (
    {path: _usable(named[path]) for path in predicted}
    if stages is None
    else _columns(stages, {path: structs[path] for path in predicted}, result.of)
  )
  parts, leaves, structs_of, paths, kinds_of = [], [], [], [], []
  for path, i in predicted.items():
    struct = structs[path]
    layers = range(struct.shape[0]) if path in result.stacked else [None]
    halves = ('real', 'imag') if jnp.issubdtype(struct.dtype, jnp.complexfloating) else ('',)
    column = columns[path]
    if len(layers) + len(halves) > 2:  # Taken apart: on the host without a compilation.
      column = jax.tree.map(_on_host, column)
    for layer, half in itertools.product(layers, halves):
      part = _Part(i, layer, half)
      parts.append(part)
      kinds_of.append(result.of[path])
      if part == _Part(i):
        leaf = column
        structs_of.append(struct)
      elif isinstance(column, tuple):
        leaf = tuple(part.of(stage, 0) for stage in column)
        structs_of.append(_struct(leaf[-1], 0))
      else:
        leaf = part.of(column, 1)
        structs_of.append(_struct(leaf, 1))
      leaves.append(leaf)
      paths.append(path + (f'[{layer}]' if layer is not None else '') + (half and f'.{half}'))
  return History(
    leaves=leaves,
    structs=structs_of,
    paths=paths,
    kinds=kinds_of,
    length=length,
    _parts=parts,
    _given=flat,
    _is_stacked=stages is None,
    _treedef=treedef,
  )


# --- forms ----------------------------------------------------------------------------------------


def _stages(history: Any) -> list[trees.PyTree] | None:
  """The stages of a history given one by one, oldest first; None for a stacked one."""
  if type(history) in (list, tuple):
    stages = list(history)
  elif isinstance(history, (str, bytes, set, frozenset)) or hasattr(history, 'state_dict'):
    raise UserError(
      f'the history is of {type(history)}; expected the stages in order, oldest first: a list of '
      'pytrees (of PyTorch modules their state_dict()).'
    )
  elif isinstance(history, Mapping):
    _check_mapping(history)
    return None
  elif not trees.is_array(history) and jax.tree_util.all_leaves([history]):
    # No container of JAX's: a deque, a generator, a sequence of another library.
    if not isinstance(history, collections.abc.Iterable):
      raise UserError(
        f'the history is of {type(history)}; expected the stages in order, oldest first: a list of '
        'pytrees, a Trajectory, or one pytree with the stages on axis 0 of its leaves.'
      )
    stages = list(history)
  else:
    return None
  if not stages:
    raise UserError('the history is empty; expected the weights of at least one stage.')
  for number, stage in enumerate(stages):
    if hasattr(stage, 'state_dict') and hasattr(stage, 'load_state_dict'):
      raise UserError(
        f'stage {number} is a module of {type(stage)}; expected a pytree: its state_dict().'
      )
  return stages


_STAGE_KEY = re.compile(r'\D*(stage|step|epoch|checkpoint|ckpt)\D*\d+|\d+|', re.IGNORECASE)


def _check_mapping(history: Mapping[Any, Any]) -> None:
  """Raises where a dict is one of stages, or might be one: their order is not said."""
  values = [jax.tree.flatten(value) for value in history.values()]
  if len(values) < 2 or not values[0][0]:
    return
  shapes = [([np.shape(leaf) for leaf in leaves], treedef) for leaves, treedef in values]
  if any(shape != shapes[0] for shape in shapes[1:]):
    return
  lengths = {shape[0] if shape else None for shape in shapes[0][0]}
  by_number = all(_STAGE_KEY.fullmatch(str(key)) for key in history)
  if by_number or len(lengths) > 1 or None in lengths:
    raise UserError(
      f'the history is a {type(history).__name__} of {len(values)} entries that are alike, '
      f'{next(iter(history))!r} and so on. If they are stages, give a list, oldest first '
      '(list(history.values()), where that is their order). If the stages are on axis 0 of their '
      'leaves, give Trajectory(history).'
    )


def _struct(leaf: Any, axes: int) -> Any:
  """Shape and dtype of an array without its first axes; other leaves as they are."""
  if not trees.is_array(leaf) or trees.is_state(leaf):
    return leaf
  return jax.ShapeDtypeStruct(tuple(leaf.shape)[axes:], trees.dtype_of(leaf))


def _last(leaf: Any) -> Any:
  """The newest stage of a stacked leaf."""
  if trees.is_state(leaf):
    return jax.tree.map(_last, leaf)
  return leaf[-1] if trees.is_array(leaf) else leaf


def _check_dtype(path: str, dtype: np.dtype) -> None:
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  width = dtype.itemsize // (2 if is_complex else 1)
  if width > 8:
    raise UserError(f'leaf {path!r} is {dtype}, which JAX does not have; cast the history.')
  if width > 4 and not jax.config.read('jax_enable_x64'):
    raise UserError(
      f'leaf {path!r} is {dtype}, which JAX would narrow to '
      f'{"complex64" if is_complex else "float32"} in silence; cast the history or set '
      'jax_enable_x64.'
    )


def _columns(
  stages: Sequence[trees.PyTree], structs: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, tuple[Any, ...]]:
  """Path -> the stages of a leaf that is predicted, the same in all of them.

  Kept leaves may differ between stages, or be missing.

  Raises:
    UserError: a stage differs; stage and leaf are named.
  """
  newest = f'stage {len(stages) - 1} (the newest)'
  treedef: Any = jax.tree.structure(stages[-1], is_leaf=trees.is_state)
  columns: dict[str, list[Any]] = {path: [] for path in structs}
  for number, stage in enumerate(stages):
    flat, other = jax.tree.flatten(stage, is_leaf=trees.is_state)
    if other == treedef:
      result = dict(zip(kinds, flat, strict=True))
    else:
      result = trees.named_leaves(stage, is_leaf=trees.is_state)
      extra = [
        p for p in result if p not in kinds and kinds_.default_kind(p, result[p]) != kinds_.KEEP
      ]
      names = (newest, f'stage {number}')
      same = {path: result[path] for path in (*structs, *extra) if path in result}
      trees.check_same(dict(structs), same, names=names)
      if kinds.keys() == result.keys():
        trees.check_containers(stages[-1], stage, names=names)
    for path, column in columns.items():
      leaf, struct = result[path], structs[path]
      if _is_plain(leaf) and leaf.shape == struct.shape and leaf.dtype == struct.dtype:
        column.append(leaf)  # Of a small leaf, the rest would take most of the time.
        continue
      if not trees.is_array(leaf) or (tuple(leaf.shape), trees.dtype_of(leaf)) != (
        struct.shape,
        struct.dtype,
      ):
        trees.check_same(
          dict(structs), {p: result[p] for p in structs}, names=(newest, f'stage {number}')
        )
      column.append(_usable(leaf))
  return {path: tuple(column) for path, column in columns.items()}


def _is_plain(array: Any) -> bool:
  """Whether it is an array of NumPy alone, in this machine's order of bytes."""
  return type(array) is np.ndarray and array.dtype.isnative


def _usable(array: Any) -> Any:
  """An array as JAX takes it: of NumPy in this machine's order of bytes, or of JAX."""
  if isinstance(array, jax.Array):
    return array
  if _is_torch(array):
    array = array.detach().cpu()
    dtype = trees.dtype_of(array)
    # NumPy has no bfloat16 of PyTorch's, but float32 holds all of its numbers.
    return array.float().numpy().astype(dtype) if dtype.kind == 'V' else array.numpy()
  array = np.asarray(array)
  return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder('='))


def _is_torch(array: Any) -> bool:
  return hasattr(array, 'detach') and hasattr(array, 'new_tensor')


def _like(given: Any, array: Any) -> Any:
  """A predicted array as one of the library that the given leaf is of."""
  if not _is_torch(given):
    return array
  host = np.asarray(array)
  return given.new_tensor(host.astype(np.float32) if host.dtype.kind == 'V' else host)


def _on_host(array: Any) -> Any:
  """An array that lies in this machine's memory as NumPy's, without a copy."""
  if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
    return array
  device, *others = array.devices()
  return np.asarray(array) if device.platform == 'cpu' and not others else array


def _joined(parts: Sequence[tuple[_Part, Any]], axis: int) -> Any:
  """The leaf of which these are the parts; layers go on `axis`."""
  if len(parts) == 1 and parts[0][0] == _Part(parts[0][0].leaf):
    return parts[0][1]
  arrays = [_on_host(array) for _, array in parts]
  on_host = all(isinstance(array, np.ndarray) for array in arrays)
  if parts[0][0].half:
    pairs = zip(arrays[::2], arrays[1::2], strict=True)
    arrays = [_complex(*pair) if on_host else jax.lax.complex(*pair) for pair in pairs]
  is_stack = parts[0][0].layer is not None
  whole = (np if on_host else jnp).stack(arrays, axis) if is_stack else arrays[0]
  return jax.device_put(whole) if on_host else whole


def _complex(real: np.ndarray, imag: np.ndarray) -> np.ndarray:
  whole = np.empty(real.shape, np.result_type(real, np.complex64))
  whole.real, whole.imag = real, imag
  return whole


def _repeated(leaf: Any, times: int) -> Any:
  """A kept leaf once for each stage; an object in an array of objects."""
  if trees.is_state(leaf):
    return jax.tree.map(lambda x: _repeated(x, times), leaf)
  if _is_torch(leaf):
    return leaf.expand(times, *leaf.shape)
  if trees.is_array(leaf):
    return (jnp if isinstance(leaf, jax.Array) else np).stack([leaf] * times)
  return trees.objects([leaf] * times)


# --- finiteness -----------------------------------------------------------------------------------


def check_finite(history: History) -> None:
  """Raises where a leaf that is predicted has NaN or infinity; not for traced histories.

  Raises:
    UserError: the leaf, the stage and how many values are named.
  """
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(history.leaves)):
    return
  if _surely_finite(history.leaves):
    return
  for i, leaf in enumerate(history.leaves):
    # Evaluated now, also where the caller is traced and the history is a constant of the trace.
    with jax.ensure_compile_time_eval():
      leaf_is_finite = _is_finite(leaf)
    if not leaf_is_finite:
      counts = [_count_bad(stage) for stage in leaf]
      stage = next(stage for stage, count in enumerate(counts) if count)
      size = math.prod(history.structs[i].shape)
      raise UserError(
        f'leaf {history.paths[i]!r} has {counts[stage]} of {size} values NaN or infinite at stage '
        f'{stage} of {history.length} (0 is the oldest); expected finite weights at every stage.'
      )


def _surely_finite(leaves: list[Any]) -> bool:
  """Whether all leaves lie on this host and are finite: one reading of them, by all processors."""
  parts = []
  for leaf in leaves:
    arrays = leaf
    if not (isinstance(leaf, tuple) and all(map(_is_plain, leaf))):
      arrays = [_on_host(array) for array in jax.tree.leaves(leaf)]
    if not all(isinstance(array, np.ndarray) for array in arrays):
      return False
    flat = [array.reshape(-1) for array in arrays]
    for pair in (flat[i : i + 2] for i in range(0, len(flat), 2)):
      parts += [[x[i : i + _STRETCH] for x in pair] for i in range(0, pair[0].size, _STRETCH)]
  many = sum(pair[0].size for pair in parts) > _STRETCH
  threads = processors() if many else 1
  if threads == 1:
    return all(sums_finite(*pair) for pair in parts)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    calls = range(threads)
    result = pool.map(lambda i: all(sums_finite(*pair) for pair in parts[i::threads]), calls)
    return all(result)


def _is_finite(leaf: Any) -> bool:
  """Whether the stages of a leaf, a tuple of arrays or one array, hold no NaN or infinity."""
  for array in jax.tree.leaves(leaf):
    if not isinstance(array, jax.Array):
      parts = [array]
    elif not (array.is_fully_addressable or array.is_fully_replicated):
      # All processes get the answer for all of it.
      if not _all_finite(array):
        return False
      continue
    elif array.is_fully_replicated:
      parts = [array.addressable_data(0)]
    else:
      parts = [shard.data for shard in array.addressable_shards]
    for part in parts:
      if isinstance(part, jax.Array) and next(iter(part.devices())).platform != 'cpu':
        if not _all_finite(part):
          return False
      elif not _all_finite_on_host(np.asarray(part)):
        return False
  return True


# On the host NumPy checks the arrays where they lie: a compilation for every shape would take far
# longer than the prediction.
def _all_finite_on_host(array: np.ndarray) -> bool:
  flat = array.reshape(-1)
  return all(np.isfinite(flat[i : i + _STRETCH]).all() for i in range(0, flat.size, _STRETCH))


def _count_bad(stage: Any) -> int:
  """How many values are NaN or infinite."""
  if isinstance(stage, jax.Array) and not stage.is_fully_addressable:
    return int((~jnp.isfinite(stage)).sum())
  return int((~np.isfinite(np.asarray(stage, np.float64))).sum())


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()
