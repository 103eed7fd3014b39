"""Pytrees of weights: leaf paths and kinds, stacking, comparison with errors that name leaves."""

from collections.abc import Sequence
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


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Path -> leaf, in the order of `jax.tree.leaves`.

  Raises:
    UserError: two leaves have the same path, as `{'a/b': x, 'a': {'b': y}}` would.
  """
  named: dict[str, Any] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = path_string(key_path)
    if path in named:
      raise UserError(f'two leaves have the path {path!r}; wanted a path of its own for each.')
    named[path] = leaf
  return named


def is_floating(leaf: Any) -> bool:
  """Whether a leaf holds real floating-point numbers, bfloat16 included."""
  return jnp.issubdtype(dtype_of(leaf), jnp.floating)


def dtype_of(leaf: Any) -> Any:
  """The dtype of an array, or of what NumPy makes of something else."""
  # Not jnp.result_type: it would narrow float64 to float32 where x64 is off, and hide a mismatch.
  return leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype


def check_same(reference: PyTree, other: PyTree, *, names: tuple[str, str]) -> None:
  """Checks that two trees agree in structure, shapes and dtypes.

  Args:
    reference: the tree wanted (arrays or `jax.ShapeDtypeStruct`s).
    other: the tree found.
    names: what the two are called in the error, reference first.

  Raises:
    UserError: they differ; the first differing leaf is named with what was found and wanted.
  """
  wanted, found = named_leaves(reference), named_leaves(other)
  if missing := [path for path in wanted if path not in found]:
    raise UserError(f'{names[1]} lacks leaf {missing[0]!r}, which {names[0]} has{_more(missing)}.')
  if extra := [path for path in found if path not in wanted]:
    raise UserError(f'{names[1]} has leaf {extra[0]!r}, which {names[0]} lacks{_more(extra)}.')
  for path in wanted:
    for what, of in (('shape', lambda leaf: tuple(np.shape(leaf))), ('dtype', dtype_of)):
      want, have = of(wanted[path]), of(found[path])
      if want != have:
        raise UserError(
          f'leaf {path!r} has {what} {have} in {names[1]}; wanted {want}, as in {names[0]}.'
        )
  found_in: Any = jax.tree.structure(other)
  wanted_in: Any = jax.tree.structure(reference)
  if found_in != wanted_in:
    raise UserError(
      f'{names[1]} has the leaves of {names[0]} in containers of other types: found {found_in}, '
      f'wanted {wanted_in}.'
    )


def _more(paths: Sequence[str]) -> str:
  return f' (and {len(paths) - 1} more such leaves)' if len(paths) > 1 else ''


def stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks trees of equal structure, shapes and dtypes on a new leading axis of every leaf.

  Raises:
    UserError: JAX would narrow a leaf's 64-bit dtype in silence; the leaf is named.
  """

  def join(key_path: tuple, *leaves: Any) -> jax.Array:
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    if arrays[0].dtype != dtype_of(leaves[0]):
      raise UserError(
        f'leaf {path_string(key_path)!r} is {dtype_of(leaves[0])}, which JAX would narrow to '
        f'{arrays[0].dtype} in silence; cast it or set jax_enable_x64.'
      )
    return jnp.stack(arrays)

  return jax.tree_util.tree_map_with_path(join, *trees)


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
  found: Any = jax.typeof(leaf)
  return found.manual_axis_type.varying
