"""What a name stands for: an entry of a registry, or an object of the user's own modules.

Predictors, models, tasks and data are named in flags and configs by the name under which they were
registered, or as 'package.module:object', which is imported.
"""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from know_jax.errors import UserError, unknown_name

_T = TypeVar('_T')


class Registry(Mapping[str, _T]):
  """Name -> entry, in the order of registration.

  Args:
    what: what an entry is, in the singular: 'predictor', 'model'.
    check: `check(entry, name)` raises a `UserError` where an entry is none.
  """

  def __init__(self, what: str, check: Callable[[Any, str], None] | None = None):
    self._what, self._check = what, check
    self._entries: dict[str, _T] = {}

  def register(self, name: str, entry: _T, *, replace: bool = False) -> _T:
    """Adds an entry, and returns it.

    Args:
      name: what it is called from now on.
      entry: the entry.
      replace: whether it may take the place of another of that name.

    Raises:
      UserError: the name is taken or no plain name, or the entry is not what the registry holds.
    """
    if not isinstance(name, str) or not name.isidentifier():
      raise UserError(f'the name of a {self._what} is {name!r}; expected one like my_{self._what}.')
    if name in self._entries and not replace:
      raise UserError(f'there is a {self._what} {name!r} already; give another name.')
    if self._check is not None:
      self._check(entry, f'{self._what} {name!r}')
    self._entries[name] = entry
    return entry

  def find(self, name: str) -> tuple[str, _T]:
    """The entry that a name stands for, with its short name.

    Args:
      name: a registered name, or 'package.module:object'; the short name of that is 'object'.

    Raises:
      UserError: it is neither, or what is imported is not what the registry holds.
    """
    if isinstance(name, str) and ':' in name:
      entry = load_object(name, self._what)
      if self._check is not None:
        self._check(entry, f'{self._what} {name!r}')
      return name.rpartition(':')[2].rpartition('.')[2], entry
    if not isinstance(name, str) or name not in self._entries:
      raise unknown_name(self._what, name, self._entries)
    return name, self._entries[name]

  def __getitem__(self, name: str) -> _T:
    return self._entries[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)


def load_object(path: str, what: str = 'object') -> Any:
  """Imports an object; modules are looked for in the current folder too.

  Args:
    path: 'package.module:object', where the object may be an attribute of another: 'module:a.b'.
    what: what it is to be, for errors.

  Raises:
    UserError: the module cannot be imported, or lacks the object.
  """
  module_name, _, attributes = path.partition(':')
  if not module_name or not all(part.isidentifier() for part in attributes.split('.')):
    raise UserError(f"{what} is {path!r}; expected a name, or 'package.module:object'.")
  try:
    with _current_folder():
      result = importlib.import_module(module_name)
  except Exception as error:  # Whatever the user's module raises while it is imported.
    raise UserError(
      f'{what} {path!r}: cannot import {module_name!r} ({type(error).__name__}: {error}).'
    ) from error
  for name in attributes.split('.'):
    try:
      result = getattr(result, name)
    except AttributeError as error:
      raise UserError(f'{what} {path!r}: {module_name!r} has no {attributes!r}.') from error
  return result


def discover(package: str, table: str, *, skip: str = '') -> dict[str, Any]:
  """What the modules of a package declare: their dicts of one name, joined.

  So a new entry is one file: nothing else lists it.

  Args:
    package: its name; its modules are imported.
    table: the name of the dict in each module that declares entries.
    skip: the name of the module that asks, if it is one of them.
  """
  result: dict[str, Any] = {}
  for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f'{package}.'):
    if module.name != skip:
      result |= getattr(importlib.import_module(module.name), table, {})
  return result


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
  folder = str(Path.cwd())
  if folder in sys.path or '' in sys.path:
    yield
    return
  sys.path.append(folder)
  try:
    yield
  finally:
    sys.path.remove(folder)
