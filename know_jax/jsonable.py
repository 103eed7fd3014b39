"""Plain JSON data, without loss: NaN and infinities as strings, NumPy scalars as numbers."""

import hashlib
import json
import math
from typing import Any

from know_jax.errors import UserError

_NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def plain(value: Any, what: str) -> Any:
  """Turns a value into plain JSON data, without loss.

  Tuples become lists, and NumPy and JAX scalars the Python numbers they equal. Since JSON knows
  neither NaN nor infinities, these become the strings 'NaN', 'Infinity' and '-Infinity', which
  `float()` reads and `restored` turns back; a string that reads like that already is refused.

  Args:
    value: nested dicts (with string keys), lists, tuples and scalars.
    what: what the value is called in errors.

  Returns:
    Dicts, lists, strings, booleans, integers, finite floats and None.

  Raises:
    UserError: something in it cannot be kept; it is named.
  """
  if isinstance(value, dict):
    for key in value:
      if not isinstance(key, str):
        raise UserError(f'{what} has the key {key!r} of {type(key)}; expected a string.')
    return {key: plain(entry, f'{what}.{key}') for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(entry, f'{what}[{i}]') for i, entry in enumerate(value)]
  if getattr(value, 'shape', None) == () and hasattr(value, 'item'):
    value = value.item()
  if isinstance(value, str):
    if value in _NON_FINITE:
      raise UserError(f'{what} is the string {value!r}, which stands for a number in JSON here.')
    return str(value)
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, int):
    return int(value)
  if isinstance(value, float):
    if math.isnan(value):
      return 'NaN'
    if math.isinf(value):
      return 'Infinity' if value > 0 else '-Infinity'
    return float(value)
  raise UserError(
    f'{what} is {value!r} of {type(value)}; expected a dict, list, string, number, boolean or None.'
  )


def restored(value: Any) -> Any:
  """The inverse of `plain`: NaN and infinities from the strings that stand for them."""
  if isinstance(value, dict):
    return {key: restored(entry) for key, entry in value.items()}
  if isinstance(value, list):
    return [restored(entry) for entry in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def digest(value: Any) -> str:
  """The SHA-256 of JSON data, as hexadecimal digits; the order of keys does not matter.

  Raises:
    UserError: something in it is not what `plain` takes.
  """
  return hashlib.sha256(json.dumps(plain(value, 'value'), sort_keys=True).encode()).hexdigest()


def json_line(value: dict[str, Any], what: str) -> str:
  """One line of a `.jsonl` file, ended; NaN and infinities as in `plain`.

  Raises:
    UserError: something in it is not what `plain` takes.
  """
  return json.dumps(plain(value, what), allow_nan=False) + '\n'
