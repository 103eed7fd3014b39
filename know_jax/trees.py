"""Pytrees of weights: leaf paths and kinds, stacking, comparison with errors that name leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError

PyTree = Any


def path_string(key_path: tuple) -> str:
  """The keys of a JAX key path joined by `/`, as in `conv1/kernel`."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in key_path
  )


def leaf_paths(tree: PyTree) -> list[str]:
  """The path of every leaf, in the order of `jax.tree.leaves`."""
  return [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Path -> leaf, in the order of `jax.tree.leaves`; what `is_leaf` says of is taken as a leaf.

  Raises:
    UserError: two leaves have the same path, as `{'a/b': x, 'a': {'b': y}}` would.
  """
  named: dict[str, Any] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf):
    path = path_string(key_path)
    if path in named:
      raise UserError(f'two leaves have the path {path!r}; expected a path of its own for each.')
    named[path] = leaf
  return named


def is_floating(leaf: Any) -> bool:
  """Whether a leaf holds real floating-point numbers, bfloat16 included."""
  return jnp.issubdtype(dtype_of(leaf), jnp.floating)


def is_inexact(leaf: Any) -> bool:
  """Whether a leaf holds real or complex floating-point numbers."""
  return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def is_array(leaf: Any) -> bool:
  """Whether a leaf is an array: of NumPy, JAX, PyTorch, or anything with a shape and a dtype."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def is_state(node: Any) -> bool:
  """Whether a node of a tree is the state of an optimizer of Optax."""
  return isinstance(node, tuple) and type(node).__module__.partition('.')[0] == 'optax'


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array, or of what NumPy makes of something else."""
  # Not jnp.result_type: it would narrow float64 to float32 where x64 is off, and hide a mismatch.
  dtype = leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype
  if isinstance(dtype, str) or type(dtype).__module__ == 'torch':
    try:
      return jnp.dtype(str(dtype).removeprefix('torch.'))
    except TypeError:  # Quantised, of PyTorch alone.
      return np.dtype(object)
  return dtype


def wide(dtype: Any) -> Any:
  """The dtype to compute in: float32 for what is narrower, 8-bit floats included."""
  return jnp.promote_types(dtype, jnp.float32) if dtype.itemsize > 1 else np.dtype(np.float32)


def check_same(reference: PyTree, other: PyTree, *, names: tuple[str, str]) -> None:
  """Checks that two trees agree in structure, shapes and dtypes.

  Args:
    reference: the tree expected (arrays or `jax.ShapeDtypeStruct`s).
    other: the tree found.
    names: what the two are called in the error, reference first.

  Raises:
    UserError: they differ; the first differing leaf is named with what was found and expected.
  """
  expected, result = named_leaves(reference), named_leaves(other)
  if missing := [path for path in expected if path not in result]:
    raise UserError(f'{names[1]} lacks leaf {missing[0]!r}, which {names[0]} has{_more(missing)}.')
  if extra := [path for path in result if path not in expected]:
    raise UserError(f'{names[1]} has leaf {extra[0]!r}, which {names[0]} lacks{_more(extra)}.')
  for path in expected:
    if not (is_array(expected[path]) or is_array(result[path])):
      continue
    for what, of in (('shape', lambda leaf: tuple(np.shape(leaf))), ('dtype', dtype_of)):
      want, have = of(expected[path]), of(result[path])
      if want != have:
        raise UserError(
          f'leaf {path!r} has {what} {have} in {names[1]}; expected {want}, as in {names[0]}.'
        )
  check_containers(reference, other, names=names)


def check_containers(reference: PyTree, other: PyTree, *, names: tuple[str, str]) -> None:
  """Checks that two trees of the same leaves are made of containers of the same types.

  Raises:
    UserError: they are not.
  """
  result: Any = jax.tree.structure(other)
  expected: Any = jax.tree.structure(reference)
  if _types(result) != _types(expected):
    raise UserError(
      f'{names[1]} has the leaves of {names[0]} in containers of other types: found {result}, '
      f'expected {expected}.'
    )


def _types(treedef: Any) -> Any:
  """The types of a tree's containers; what else they hold, such as functions, may differ."""
  data = treedef.node_data()
  return data and (data[0], [_types(child) for child in treedef.children()])


def _more(paths: Sequence[str]) -> str:
  return f' (and {len(paths) - 1} more such leaves)' if len(paths) > 1 else ''


def stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks trees of equal structure, shapes and dtypes on a new leading axis of every leaf.

  What is no array, such as a function or a Python number, goes into an array of objects.

  Raises:
    UserError: JAX would narrow a leaf's 64-bit dtype in silence; the leaf is named.
  """

  def join(key_path: tuple, *leaves: Any) -> Any:
    if not is_array(leaves[-1]):
      return objects(leaves)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
      # By NumPy, as JAX would compile programs for every shape.
      result = jax.device_put(np.stack(leaves))
    else:
      result = jnp.stack([jnp.asarray(leaf) for leaf in leaves])
    if result.dtype != dtype_of(leaves[0]):
      raise UserError(
        f'leaf {path_string(key_path)!r} is {dtype_of(leaves[0])}, which JAX would narrow to '
        f'{result.dtype} in silence; cast it or set jax_enable_x64.'
      )
    return result

  return jax.tree_util.tree_map_with_path(join, *trees)


def objects(values: Sequence[Any]) -> np.ndarray:
  """A NumPy array of these objects, as they are."""
  return np.fromiter(values, object, len(values))


def num_weights(tree: PyTree) -> int:
  """The number of scalars in a tree."""
  return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def vary_alike(tree: PyTree, *others: PyTree) -> PyTree:
  """Casts arrays to vary over all axes of `shard_map` over which they or the others vary.

  What a loop carries must vary over the same axes before and after a step; constants vary over
  none. Outside of `shard_map` nothing changes.
  """
  leaves = jax.tree.leaves((tree, others))
  axes = frozenset[str]().union(*map(_mapped_axes, leaves))

  def cast(leaf: Any) -> Any:
    missing = axes - _mapped_axes(leaf)
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to='varying') if missing else leaf

  return jax.tree.map(cast, tree)


def _mapped_axes(leaf: Any) -> frozenset[str]:
  result: Any = jax.typeof(leaf)
  return result.manual_axis_type.varying
