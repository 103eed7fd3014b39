"""Configs as frozen dataclasses: what is given is read once, and every field is checked."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError, placeholder

from know_jax.errors import UserError, unknown_name
from know_jax.jsonable import plain, restored

T = TypeVar('T')
Given: TypeAlias = ConfigDict | Mapping[str, Any]
"""What a config is given as."""
_WORDS = {
  int: 'a whole number', float: 'a number', str: 'a string', bool: 'True or False',
  tuple: 'a tuple', dict: 'a dict',
}  # fmt: skip
_types = typing.get_type_hints


def config_dict(config: Any) -> dict[str, Any]:
  """A config as plain JSON data, for `RunRecord.open`: nested dicts, tuples turned to lists.

  Args:
    config: a ConfigDict, a mapping, or a dataclass as `read_config` gives it.

  Raises:
    UserError: a field has no value yet, or one that JSON cannot keep; it is named.
  """
  try:
    return restored(plain(_as_dict(config), 'config'))
  except RequiredValueError as error:
    raise UserError(f'the config is incomplete: {error}') from error


def _as_dict(value: Any) -> Any:
  if isinstance(value, ConfigDict):
    return value.to_dict()
  if dataclasses.is_dataclass(value):
    # In the order of a ConfigDict, so that records are alike.
    return {name: _as_dict(getattr(value, name)) for name in sorted(_types(type(value)))}
  if isinstance(value, Mapping):
    return {key: _as_dict(entry) for key, entry in value.items()}
  return value


def editable(defaults: Any) -> ConfigDict:
  """A dataclass as a ConfigDict, for flags and config files; None may become its field's type."""
  result = {}
  for name, kind in _types(type(defaults)).items():
    value = getattr(defaults, name)
    if dataclasses.is_dataclass(value):
      value = editable(value)
    result[name] = placeholder(typing.get_args(kind)[0]) if value is None else value
  return ConfigDict(result)


def read_config(kind: type[T], config: Any, *, only: bool = False) -> T:
  """A config as a dataclass; fields that are not given have their defaults.

  Args:
    kind: the dataclass.
    config: what `config_dict` takes; one of `kind` was checked when it was made, and is given back.
    only: whether other fields may be there, which are left out.

  Raises:
    UserError: a field is unknown or missing, has a value of another type, or one that the dataclass
      refuses; it is named.
  """
  return config if isinstance(config, kind) else _read(kind, config_dict(config), '', only)


def _read(kind: Any, given: Mapping[str, Any], prefix: str, only: bool = False) -> Any:
  known = _types(kind)
  if not only and (unknown := [prefix + name for name in given if name not in known]):
    raise unknown_name('config field', unknown[0], [prefix + name for name in known])
  for field in dataclasses.fields(kind):
    absent = field.default is field.default_factory is dataclasses.MISSING
    if absent and field.name not in given:
      raise UserError(f'config field {prefix}{field.name} is missing; expected a value.')
  return kind(**{k: _checked(v, known[k], prefix + k) for k, v in given.items() if k in known})


def _checked(value: Any, kind: Any, name: str, ending: str = '') -> Any:
  args, whole = typing.get_args(kind), typing.get_origin(kind) or kind
  if type(None) in args:
    return None if value is None else _checked(value, args[0], name, ' or None')
  if whole is Any:
    return value
  if nested := dataclasses.is_dataclass(kind):
    whole = dict
  accepted: Any = {float: (int, float), tuple: list}.get(whole, whole)
  if not isinstance(value, accepted) or isinstance(value, bool) != (whole is bool):
    raise UserError(f'{name} is {value!r}; expected {_WORDS[whole]}{ending}.')
  if nested:
    return _read(kind, value, f'{name}.')
  if whole is tuple:
    return tuple(_checked(entry, args[0], f'{name}[{i}]') for i, entry in enumerate(value))
  if whole is dict:
    return {key: _checked(entry, args[1], f'{name}.{key}') for key, entry in value.items()}
  return value


def check_least(config: Any, least: float, *names: str) -> None:
  """Checks that fields are at least so much; raises UserError naming the first that is not."""
  for name in names:
    if not getattr(config, name) >= least:
      raise UserError(f'{name} is {getattr(config, name)}; expected at least {least}.')
