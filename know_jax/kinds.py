"""Which kind a leaf of weights is: conv, fc, bias, or kept as it is. One rule set for all names.

`names.py` has what names and shapes tell. Where they leave two readings, that is an error which
names the leaf.

Rules of the user's, regular expression -> kind, come first. The first whose expression is found in
a leaf's path decides, with one reservation: biases, the leaves of normalisation layers and all
leaves of rank 0 and 1 are touched only by a rule that names them. An expression names a leaf if it
matches up to the end of the path and covers the leaf's whole last name; for `weight`, `kernel` and
`w`, which matrices are called too, some of the module's name as well. So `weight=fc` leaves norms
alone, `proj=fc` leaves `c_proj/bias` a bias, and `bias$=keep` or `norm/weight$=bias` do what they
say.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.names import KEEP, OPTIMIZER_STATE, STACK, WEIGHT, Names, Verdict, parts_of
from know_jax.trees import PyTree, dtype_of, is_array, is_inexact, is_state, named_leaves

KindFn = Callable[[str, Any], str | None]

Rules = KindFn | Mapping[str, str]
"""A function `(path, leaf) -> kind or None`, or a mapping from regular expressions to kinds."""

KINDS = ('conv', 'fc', 'bias')
"""The kinds of leaf that are predicted; `'keep'` marks the leaves that are not."""

_SHOWN = 20  # Leaves that a message names, at most.


class _Rule:
  """One regular expression and the kind that it gives."""

  def __init__(self, pattern: str, kind: str):
    if not isinstance(pattern, str):
      raise UserError(f'kinds: found {pattern!r}; expected a regular expression.')
    if kind not in (*KINDS, KEEP):
      raise unknown_name(f'kind of {pattern!r}', kind, (*KINDS, KEEP))
    flags = re.match(r'(\(\?[aiLmsux]+\))?', pattern)
    assert flags is not None
    try:
      self.search = re.compile(pattern).search
      self._ending = re.compile(f'{flags[0]}(?:{pattern[flags.end() :]})\\Z').search
    except re.error as error:
      raise UserError(f'kinds: {pattern!r} is no regular expression: {error}.') from error
    self.pattern, self.kind = pattern, kind
    self.shown = f"'{pattern}={kind}'"

  def names(self, path: str, start: int, name: str) -> bool:
    """Whether it matches up to the end of a path, and covers the last name, which begins there."""
    ending = self._ending(path)
    if ending is None:
      return False
    return not start or ending.start() <= (start - 2 if WEIGHT.fullmatch(name) else start)


def parse_kinds(rules: Sequence[str]) -> dict[str, str]:
  """Rules as given to `--kinds`, 'regex=kind': regular expression -> kind.

  Raises:
    UserError: a rule is not of that form.
  """
  result = {}
  for rule in rules:
    pattern, equals, kind = rule.rpartition('=')
    if not equals or not pattern:
      raise UserError(f"kinds: found {rule!r}; expected 'regex=kind', as in 'embed=keep'.")
    result[pattern] = kind
  return result


# --- all leaves of a tree -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kinds:
  """The kinds of all leaves of a tree."""

  of: dict[str, str]  # Path -> kind.
  notes: list[str]  # What the user should be told, a sentence or two each.
  # The paths of the leaves that hold one layer after the other on their first axis.
  stacked: frozenset[str]


def find_kinds(
  leaves: Mapping[str, Any], kinds: Rules | None = None, stacked: str | None = None
) -> Kinds:
  """Finds the kind of every leaf, and what is to be said of them.

  Args:
    leaves: path -> an array, anything else with a shape and a dtype, or any other object, which is
      kept.
    kinds: rules of the user's, see the top of this module; or a function `(path, leaf) -> kind`
      that returns None where names shall decide.
    stacked: a regular expression. The leaves in whose paths it is found, from the beginning of a
      name on, hold layers on their first axis, each of which is a leaf of its own.

  Raises:
    UserError: leaves have no kind (all are named, with the rule to give), or a rule is wrong, fits
      no leaf, or gives a kind to what cannot be predicted.
  """
  arrays = {path: leaf for path, leaf in leaves.items() if is_array(leaf)}
  layered = _layered(stacked, arrays)
  arrays |= {
    path: jax.ShapeDtypeStruct(arrays[path].shape[1:], dtype_of(arrays[path])) for path in layered
  }
  names = Names({p: tuple(leaf.shape) for p, leaf in arrays.items() if _may_be_weight(leaf)})
  if not (kinds is None or isinstance(kinds, Mapping) or callable(kinds)):
    raise UserError(
      f'kinds is {kinds!r}; expected a mapping of regular expressions to kinds, as in '
      "{'embed': 'keep'}, or a function (path, leaf) -> kind."
    )
  rules = [_Rule(*rule) for rule in kinds.items()] if isinstance(kinds, Mapping) else []
  touched: dict[_Rule, str | None] = {}  # Of each rule that was found: a leaf that it only touches.
  changed: dict[_Rule, list[str]] = collections.defaultdict(list)
  kept: dict[str, list[str]] = collections.defaultdict(list)
  unknown: dict[str, Verdict] = {}
  of: dict[str, str] = {}
  for path, leaf in arrays.items():
    verdict = names.verdict(path) if path in names.parts else Verdict(KEEP)
    kind = None
    if verdict.why != OPTIMIZER_STATE:
      for rule, is_named in _rules_for(path, rules):
        if not is_named and (verdict.is_small or len(leaf.shape) < 2):
          touched.setdefault(rule, path)
          continue
        touched[rule] = None
        if kind is None and not (is_named or verdict.why or verdict.kind in (None, rule.kind)):
          changed[rule].append(f'{path!r} ({verdict.kind})')
        kind = kind or rule.kind
      if callable(kinds):
        kind = _returned(kinds, path, leaf)
    if kind is None and verdict.kind is None:
      unknown[path] = verdict
      continue
    if kind is None and verdict.why:
      kept[verdict.why].append(path)
    of[path] = kind or verdict.kind or KEEP
    if of[path] != KEEP and not is_inexact(leaf):
      raise _unpredictable(path, leaf, of[path])
  for rule in rules:
    if rule not in touched or touched[rule]:
      raise _useless(rule, touched.get(rule), leaves)
  if unknown:
    raise _unknown_kinds(unknown, arrays)
  notes = [
    f'kinds: the rule {rule.shown} changes leaves whose kind is clear: {_listed(paths)}. A rule '
    "that names a leaf to its end, as 'head/kernel$=keep' does, is taken at its word."
    for rule, paths in changed.items()
  ]
  if kept:
    told = [f'{why} {_listed(map(repr, paths))}' for why, paths in kept.items()]
    paths = [p for why, paths in kept.items() if why != OPTIMIZER_STATE for p in paths]
    how = (
      f' {_shown_rules({KEEP: paths}, leaves)} keeps them without a warning; fc or bias in place '
      'of keep predicts them.'
    )
    notes.append(f'kept as they are in the newest stage: {"; ".join(told)}.{how if paths else ""}')
  if objects := [p for p in leaves if p not in arrays]:
    told = [f'{p!r} ({type(leaves[p]).__name__})' for p in objects]
    notes.append(f'handed back as they are, being no weights: {_listed(told)}.')
  kinds_of = {path: of.get(path, KEEP) for path in leaves}
  if set(kinds_of.values()) == {KEEP}:
    notes.append(f'nothing is predicted: all of {len(leaves)} leaves are kept.')
  return Kinds(kinds_of, notes, layered)


def _layered(stacked: str | None, arrays: Mapping[str, Any]) -> frozenset[str]:
  """The leaves that a regular expression declares to be stacks of layers."""
  if stacked is None:
    return frozenset()
  try:
    pattern = re.compile(f'(?:^|[/.])(?:{stacked})')
  except re.error as error:
    raise UserError(f'stacked: {stacked!r} is no regular expression: {error}.') from error
  result = [path for path, leaf in arrays.items() if is_inexact(leaf) and pattern.search(path)]
  if not result:
    raise UserError(
      f'stacked: {stacked!r} is found in no path of a floating-point leaf; the first leaf is '
      f'{next(iter(arrays), None)!r}.'
    )
  for path in result:
    if not arrays[path].shape:
      raise UserError(
        f'stacked: {stacked!r} fits leaf {path!r}, a scalar; expected layers on axis 0.'
      )
  return frozenset(result)


def _may_be_weight(leaf: Any) -> bool:
  # Raw bytes are what np.load makes of bfloat16: weights, but for the dtype.
  return is_inexact(leaf) or getattr(dtype_of(leaf), 'type', None) is np.void


def _rules_for(path: str, rules: Sequence[_Rule]) -> Iterable[tuple[_Rule, bool]]:
  """The rules found in a path, and whether each names the leaf; `.` may be written as `/`."""
  if not rules:
    return
  parts = parts_of(path)
  plain = '/'.join(parts)
  start, forms = len(plain) - len(parts[-1]), {path, plain}
  for rule in rules:
    if any(map(rule.search, forms)):
      yield rule, any(rule.names(form, start, parts[-1]) for form in forms)


def _returned(kinds: KindFn, path: str, leaf: Any) -> str | None:
  kind = kinds(path, leaf)
  if kind is not None and kind not in (*KINDS, KEEP):
    raise UserError(
      f'kinds({path!r}, leaf) returned {kind!r}; expected one of {", ".join((*KINDS, KEEP))}, or '
      'None for the default rule.'
    )
  return kind


def _unpredictable(path: str, leaf: Any, kind: str) -> UserError:
  dtype = dtype_of(leaf)
  if _may_be_weight(leaf):
    return UserError(
      f'leaf {path!r} has dtype {dtype}, raw bytes, as np.load gives bfloat16 and float8; expected '
      'numbers: give leaf.view(ml_dtypes.bfloat16), or what it is, in its place.'
    )
  return UserError(
    f'leaf {path!r} has dtype {dtype} but kind {kind!r}; only floating-point leaves can be '
    "predicted, others must be 'keep'."
  )


def _useless(rule: _Rule, touched: str | None, leaves: Mapping[str, Any]) -> UserError:
  if touched is None:
    return UserError(
      f'kinds: {rule.pattern!r} is found in no path; the first is {next(iter(leaves), None)!r}.'
    )
  parts = parts_of(touched)
  return UserError(
    f'kinds: {rule.pattern!r} changes no leaf. It is found in {touched!r}, but biases, norms and '
    'other vectors are only touched by an expression that names them to the end, such as '
    f"'{'/'.join(map(re.escape, parts[-2:]))}$'."
  )


def _unknown_kinds(unknown: Mapping[str, Verdict], leaves: Mapping[str, Any]) -> UserError:
  told = []
  for path, verdict in unknown.items():
    told.append(f'leaf {path!r} with shape {tuple(leaves[path].shape)} has no known kind')
    if verdict.why:
      told[-1] += f' (it may be {verdict.why})'
  rules: dict[str, list[str]] = collections.defaultdict(list)
  for path, verdict in unknown.items():
    rules['fc' if verdict.why else KEEP].append(path)
  hint = ''
  if any(STACK in verdict.why for verdict in unknown.values()):
    hint = (
      " Layers on the first axis are declared, and predicted each for itself, by stacked='layers/' "
      "(--stacked), a regular expression for their paths ('' for all leaves)."
    )
  return UserError(
    f'{_listed(told)}. Say which they are, in place of what stands here: '
    f'{_shown_rules(rules, leaves)}; one of {", ".join((*KINDS, KEEP))}.{hint}'
  )


def _shown_rules(kinds: Mapping[str, Sequence[str]], leaves: Iterable[str]) -> str:
  """Rules to paste, for the library and for files, that fit the given leaves alone."""
  rules = {_pattern(paths, leaves): kind for kind, paths in kinds.items()}
  library = ', '.join(
    f"{'r' if chr(92) in pattern else ''}'{pattern}': '{kind}'" for pattern, kind in rules.items()
  )
  files = ','.join(f'{pattern}={kind}' for pattern, kind in rules.items())
  return f"kinds={{{library}}} or --kinds='{files}'"


def _pattern(paths: Sequence[str], leaves: Iterable[str]) -> str:
  """A regular expression that names the given leaves and no others, whatever their numbers."""
  expected = {tuple(parts_of(path)) for path in paths}
  others = {
    tail
    for path in set(leaves).difference(paths)
    for parts in (parts_of(path), re.split(r'[/.]', path))
    for tail in _tails(parts)
  }
  result: dict[str, None] = {}
  for parts in sorted(expected):
    tails = _tails(parts)
    if WEIGHT.fullmatch(parts[-1]):  # Called so, a vector is named by its module too.
      tails = tails[1:] or tails
    fitting = next((tail for tail in tails if tail not in others), None)
    result[f'(^|/){fitting}' if fitting else '^' + re.escape('/'.join(parts))] = None
  if len(result) == 1:
    return f'{next(iter(result))}$'
  if all(one.startswith('(^|/)') for one in result):
    return f'(^|/)({"|".join(one.removeprefix("(^|/)") for one in result)})$'
  return f'({"|".join(result)})$'


def _tails(parts: Sequence[str]) -> list[str]:
  """Expressions for the last name, the last two, and so on."""
  forms = [r'\d+' if part.isdecimal() else re.escape(part).replace(',', '.') for part in parts]
  return ['/'.join(forms[n:]) for n in reversed(range(len(forms)))]


def _listed(told: Iterable[str]) -> str:
  told = list(told)
  more = f' and {len(told) - _SHOWN} more' if len(told) > _SHOWN else ''
  return ', '.join(told[:_SHOWN]) + more


def default_kind(path: str, leaf: Any) -> str | None:
  """The kind of a leaf that has no siblings; None where its name and shape leave it open.

  Args:
    path: the keys joined by `/`.
    leaf: an array or `jax.ShapeDtypeStruct`, without the time axis.
  """
  if not is_array(leaf) or not is_inexact(leaf):
    return KEEP
  return Names({path: tuple(leaf.shape)}).verdict(path).kind


def leaf_kinds(tree: PyTree, kinds: Rules | None = None) -> dict[str, str]:
  """Finds the kind of every leaf.

  Args:
    tree: weights (arrays or `jax.ShapeDtypeStruct`s), without the time axis.
    kinds: as in `find_kinds`.

  Returns:
    Path -> kind, in the order of `jax.tree.leaves`; the leaves of an optimizer's state are kept.

  Raises:
    UserError: as `find_kinds` does.
  """
  result: dict[str, str] = {}
  leaves = named_leaves(tree, is_leaf=is_state)
  kinds_of = find_kinds(leaves, kinds).of
  for path, leaf in leaves.items():
    inner = [f'{path}/{rest}' if path else rest for rest in named_leaves(leaf)]
    result |= dict.fromkeys(inner if is_state(leaf) else [path], kinds_of[path])
  return result


def flatten(
  variables: Any,
  rule: Rules | None = None,
  chosen: Callable[[str, str], bool] = lambda path, kind: kind != KEEP,
) -> np.ndarray:
  """The leaves that predictors move, or those that `chosen(path, kind)` picks, float64 `[d]`."""
  kinds, named = leaf_kinds(variables, rule), named_leaves(jax.device_get(variables))
  parts = [np.ravel(leaf) for path, leaf in named.items() if chosen(path, kinds[path])]
  return np.concatenate([np.empty(0), *map(np.float64, parts)])


def unflatten(vector: Any, like: Any, rule: Rules | None = None) -> Any:
  """The inverse of `flatten`: the leaves that predictors do not move are those of `like`."""
  kinds, start, leaves = leaf_kinds(like, rule), 0, []
  for path, leaf in named_leaves(like).items():
    if kinds[path] != KEEP:
      stop = start + int(np.prod(np.shape(leaf)))
      leaf = vector[start:stop].reshape(np.shape(leaf)).astype(leaf.dtype)
      start = stop
    leaves.append(leaf)
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


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
