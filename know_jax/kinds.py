"""Which kind a leaf of weights is: conv, fc, bias, or kept as it is."""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.trees import PyTree, dtype_of, is_floating, named_leaves

KindFn = Callable[[str, Any], str]


KINDS = ('conv', 'fc', 'bias')
"""The kinds of leaf that are predicted; `'keep'` marks the leaves that are not."""


KEEP = 'keep'


_ATTENTION = ('query', 'key', 'value', 'out')


# What a normalisation layer has beside its scale.
_NORMALISATION = ('bias', 'mean', 'var')


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
        f'leaf {path!r} has dtype {dtype_of(leaf)} but kind {kind!r}; only floating-point leaves '
        "can be predicted, others must be 'keep'."
      )
    if kind is None:
      raise UserError(
        f'leaf {path!r} with shape {tuple(np.shape(leaf))} has no known kind. Give '
        "kinds=lambda path, leaf: ... that returns 'conv', 'fc', 'bias' or 'keep' for it "
        '(None: the default rule).'
      )
    found[path] = kind
  return found


def parse_kinds(rules: Sequence[str]) -> dict[str, str]:
  """Rules as given to `--kinds`, 'regex=kind': regular expression -> kind.

  Raises:
    UserError: a rule is not of that form, or its kind is unknown.
  """
  found = {}
  for rule in rules:
    pattern, equals, kind = rule.rpartition('=')
    if not equals or not pattern:
      raise UserError(f"kinds: found {rule!r}; wanted 'regex=kind', as in 'embed=keep'.")
    found[pattern] = kind
  return found


def find_kinds(leaves: Mapping[str, Any], rules: Mapping[str, str]) -> dict[str, str]:
  """The kind of every leaf, by its path: its name with `.` replaced by `/`.

  The first rule whose regular expression is found in the path decides; then, for the names that
  PyTorch gives, what cannot be mistaken; then `default_kind`, for the names of Flax:

  - `weight` of rank 4 or 5 is a convolution;
  - `weight` of rank 2 is a dense kernel if a `bias` is beside it. Without one it may be an
    embedding, and must be named by a rule; so must `weight` of rank 3, a convolution or a stack of
    dense kernels;
  - `weight` of rank 1 is a normalisation's scale, kept, as are a `bias` beside it, `running_mean`
    and `running_var`.

  Args:
    leaves: path -> anything with a shape and a dtype.
    rules: regular expression -> 'conv', 'fc', 'bias' or 'keep'.

  Raises:
    UserError: a leaf has no kind, or a rule is wrong or fits no leaf.
  """
  patterns = {}
  for pattern, kind in rules.items():
    if kind not in (*KINDS, KEEP):
      raise unknown_name(f'kind of {pattern!r}', kind, (*KINDS, KEEP))
    try:
      patterns[re.compile(pattern)] = kind
    except re.error as error:
      raise UserError(f'kinds: {pattern!r} is no regular expression: {error}.') from error
  for compiled in patterns:
    if not any(compiled.search(path) for path in leaves):
      raise UserError(
        f'kinds: {compiled.pattern!r} is found in no path; the first is {next(iter(leaves))!r}.'
      )
  unknown = []

  def kind_of(path: str, leaf: Any) -> Any:
    kind = next((kind for pattern, kind in patterns.items() if pattern.search(path)), None)
    kind = kind or _torch_kind(path, leaf, leaves)
    if kind is None and default_kind(path, leaf) is None:
      unknown.append(path)
      return KEEP
    return kind

  found = leaf_kinds(dict(leaves), kind_of)
  if unknown:
    path = unknown[0]
    more = f' (and {len(unknown) - 1} more such leaves)' if len(unknown) > 1 else ''
    raise UserError(
      f'leaf {path!r} with shape {tuple(leaves[path].shape)} has no known kind{more}. Say which it '
      f"is: --kinds='{re.escape(path.rpartition('/')[2])}=KIND,...', KIND one of "
      f'{", ".join((*KINDS, KEEP))}; the first regular expression found in a path '
      'decides.'
    )
  return found


def _torch_kind(path: str, leaf: Any, leaves: Mapping[str, Any]) -> str | None:
  parent, slash, name = path.rpartition('/')

  def rank(sibling: str) -> int | None:
    found = leaves.get(f'{parent}{slash}{sibling}')
    return None if found is None else len(found.shape)

  if not is_floating(leaf):
    return None
  if name == 'weight':
    if rank(name) == 1:
      return KEEP
    if rank(name) in (4, 5):
      return 'conv'
    return 'fc' if rank(name) == 2 and rank('bias') == 1 else None
  if name in ('running_mean', 'running_var') or (name == 'bias' and rank('weight') == 1):
    return KEEP
  return None


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
