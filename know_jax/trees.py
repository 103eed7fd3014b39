"""Pytrees of weights: leaf paths and kinds, stacking, comparison with errors that name leaves."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError

PyTree = Any
KindFn = Callable[[str, Any], str]

KINDS = ('conv', 'fc', 'bias')
"""The kinds of leaf that are predicted; `'keep'` marks the leaves that are not."""

KEEP = 'keep'

_ATTENTION = ('query', 'key', 'value', 'out')
# What a normalisation layer has beside its scale.
_NORMALISATION = ('bias', 'mean', 'var')


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
  return jnp.issubdtype(_dtype(leaf), jnp.floating)


def _dtype(leaf: Any) -> Any:
  # Not jnp.result_type: it would narrow float64 to float32 where x64 is off, and hide a mismatch.
  return leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype


def default_kind(path: str, leaf: Any) -> str | None:
  """The kind of a leaf by the names that Flax gives, METHOD.md section 2; None where unknown.

  `kernel` of rank 2 -> `fc`; of rank 3 inside an attention layer (`query`, `key`, `value`, `out`)
  -> `fc`; of rank 3 and more otherwise -> `conv`. `bias` -> `bias`, whatever its rank. Kept:
  normalisation scales, everything in a `batch_stats` collection, and every leaf that is not a
  floating-point array. The shift of a normalisation layer is told from other biases by its
  sibling `scale`, which needs the whole tree: see `leaf_kinds`.

  Args:
    path: the keys joined by `/`; Flax NNX's closing `/value` is ignored.
    leaf: an array or `jax.ShapeDtypeStruct`, without the time axis.

  Returns:
    `'conv'`, `'fc'`, `'bias'`, `'keep'`, or None if no rule fits.
  """
  if not is_floating(leaf):
    return KEEP
  keys = path.removesuffix('/value').split('/')
  name, parent = keys[-1], keys[-2] if len(keys) > 1 else ''
  if 'batch_stats' in keys or name == 'scale':
    return KEEP
  if name == 'bias':
    return 'bias'
  rank = len(np.shape(leaf))
  if name == 'kernel' and rank == 2:
    return 'fc'
  if name == 'kernel' and rank > 2:
    return 'fc' if rank == 3 and parent in _ATTENTION else 'conv'
  return None


def leaf_kinds(tree: PyTree, kinds: KindFn | None = None) -> dict[str, str]:
  """Finds the kind of every leaf.

  Args:
    tree: weights (arrays or `jax.ShapeDtypeStruct`s), without the time axis.
    kinds: `(path, leaf) -> 'conv' | 'fc' | 'bias' | 'keep'` in place of `default_kind`; where it
      returns None the default rule decides, so that an override names only what it changes.

  Returns:
    Path -> kind, in the order of `jax.tree.leaves`.

  Raises:
    UserError: a leaf has no kind, or `kinds` returned something else; the leaf is named.
  """
  named = named_leaves(tree)
  # A normalisation layer has a scale and no kernel; its shift is called bias like any other, and
  # Flax NNX has its running statistics in no collection of their own.
  parents: dict[str, set[str]] = collections.defaultdict(set)
  for path in named:
    parent, _, name = path.removesuffix('/value').rpartition('/')
    parents[parent].add(name)
  found = {}
  for path, leaf in named.items():
    kind = kinds(path, leaf) if kinds is not None else None
    if kind is None:
      parent, _, name = path.removesuffix('/value').rpartition('/')
      normalises = 'scale' in parents[parent] and 'kernel' not in parents[parent]
      kind = KEEP if normalises and name in _NORMALISATION else default_kind(path, leaf)
    elif kind not in (*KINDS, KEEP):
      raise UserError(
        f'kinds({path!r}, leaf) returned {kind!r}; wanted one of {", ".join((*KINDS, KEEP))}, '
        'or None for the default rule.'
      )
    elif kind != KEEP and not is_floating(leaf):
      raise UserError(
        f'leaf {path!r} has dtype {_dtype(leaf)} but kind {kind!r}; only floating-point leaves can '
        "be predicted, others must be 'keep'."
      )
    if kind is None:
      raise UserError(
        f'leaf {path!r} with shape {tuple(np.shape(leaf))} has no known kind. Give '
        "kinds=lambda path, leaf: ... that returns 'conv', 'fc', 'bias' or 'keep' for it "
        '(None: the default rule).'
      )
    found[path] = kind
  return found


def kinds_table(leaves: dict[str, Any], kinds: dict[str, str]) -> str:
  """A line for every leaf: path, kind and shape.

  Args:
    leaves: path -> array or anything else with a shape.
    kinds: path -> kind, as `leaf_kinds` gives them.
  """
  width = max(len(path) for path in kinds)
  lines = ['leaf'.ljust(width) + '  kind  shape']
  for path, kind in kinds.items():
    lines.append(f'{path.ljust(width)}  {kind:<4}  {tuple(leaves[path].shape)}')
  return '\n'.join(lines)


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
    for what, of in (('shape', lambda leaf: tuple(np.shape(leaf))), ('dtype', _dtype)):
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
    if arrays[0].dtype != _dtype(leaves[0]):
      raise UserError(
        f'leaf {path_string(key_path)!r} is {_dtype(leaves[0])}, which JAX would narrow to '
        f'{arrays[0].dtype} in silence; cast it or set jax_enable_x64.'
      )
    return jnp.stack(arrays)

  return jax.tree_util.tree_map_with_path(join, *trees)


def num_weights(tree: PyTree) -> int:
  """The number of scalars in a tree."""
  return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))
