"""Flax's msgpack: `flax.serialization.to_bytes`, or Hugging Face's flax_model.msgpack.

The library would load the whole file; here it is walked over, and arrays are read in their places.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md, with arrays of Flax as extensions 1
(array) and 3 (NumPy scalar), each the packed shape, name of the dtype and bytes.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from know_jax.errors import UserError
from know_jax.io.weights import Leaf, Weights, of_file, opener

_FILE = 'flax_model.msgpack'
_DEPTH = 100
_CHUNKED = '__msgpack_chunked_array__'
# Code -> how many bytes its length has.
_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_NUMBERS = {
  0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8
}  # fmt: skip

LAST = True  # The first bytes of other formats may look like a map of names.


def detect(path: Path) -> bool:
  """Whether a path is a file that begins with a map of names, or a folder with such a model."""
  if path.is_dir():
    return (path / _FILE).is_file()
  with path.open('rb') as file:
    head = file.read(6)
  skip = {0xDE: 3, 0xDF: 5}.get(
    head[0] if head else 0, 1 if 0x81 <= (head or b'\0')[0] < 0x90 else 6
  )
  return any(0xA1 <= byte < 0xC0 or byte in _TEXT for byte in head[skip : skip + 1])


def open(path: Path) -> Weights:
  """Walks over a file.

  Raises:
    UserError: it is damaged, or has an array in several pieces, as Flax writes those over 1 GiB.
  """
  file_path = path / _FILE if path.is_dir() else path
  with file_path.open('rb') as file:
    walk = _Walk(file, file_path)
    leaves = list(walk.value(()))
    if file.tell() != walk.size:
      raise walk.damaged(f'{walk.size - file.tell()} bytes follow its end')
  return of_file(file_path, 'msgpack', leaves, given=path if path.is_dir() else None)


class _Walk:
  """Goes over a file value by value; gives the arrays."""

  def __init__(self, file: IO[bytes], path: Path):
    self.file, self.path = file, path
    self.size = os.fstat(file.fileno()).st_size

  def damaged(self, why: str) -> UserError:
    return UserError(f'{self.path}: not a readable msgpack file: {why}.')

  def take(self, count: int) -> bytes:
    if count > self.size - self.file.tell():
      raise self.damaged('it is cut off')
    return self.file.read(count)

  def number(self, count: int) -> int:
    return int.from_bytes(self.take(count), 'big')

  def skip(self, count: int) -> None:
    if count > self.size - self.file.tell():
      raise self.damaged('it is cut off')
    self.file.seek(count, os.SEEK_CUR)

  def text(self) -> str:
    """A key of a map."""
    code = self.number(1)
    count = code & 31 if 0xA0 <= code < 0xC0 else self.number(_TEXT.get(code, 0))
    if count > 10_000 or not (code in _TEXT or 0xA0 <= code < 0xC0):
      raise self.damaged(f'a key of a map begins with {code:#x}; expected a text')
    try:
      return self.take(count).decode()
    except UnicodeDecodeError as error:
      raise self.damaged('a key is no text') from error

  def value(self, keys: tuple[str, ...]) -> Iterator[Leaf]:
    if len(keys) > _DEPTH:
      raise self.damaged('it is nested too deep')
    code = self.number(1)
    if 0x80 <= code < 0x90 or code in (0xDE, 0xDF):
      count = code & 15 if code < 0x90 else self.number(2 if code == 0xDE else 4)
      for _ in range(count):
        key = self.text()
        if key == _CHUNKED:
          raise UserError(
            f'{self.path}: array {"/".join(keys)!r} is in several pieces, as Flax writes arrays '
            'over 1 GiB; save it as safetensors or by Orbax.'
          )
        yield from self.value((*keys, key))
    elif 0x90 <= code < 0xA0 or code in (0xDC, 0xDD):
      count = code & 15 if code < 0xA0 else self.number(2 if code == 0xDC else 4)
      for index in range(count):
        yield from self.value((*keys, str(index)))
    elif code in _EXT or 0xD4 <= code <= 0xD8:
      size = self.number(_EXT[code]) if code in _EXT else 1 << (code - 0xD4)
      kind, end = self.number(1), self.file.tell() + size
      if kind in (1, 3):
        yield self.array('/'.join(keys), end)
      else:
        self.skip(size)
    elif 0xA0 <= code < 0xC0:
      self.skip(code & 31)
    elif code in _TEXT or code in _BYTES:
      self.skip(self.number({**_TEXT, **_BYTES}[code]))
    elif code in _NUMBERS:
      self.skip(_NUMBERS[code])
    elif not (code < 0x80 or code >= 0xE0 or code in (0xC0, 0xC2, 0xC3)):
      raise self.damaged(f'a value begins with {code:#x}')

  def array(self, name: str, end: int) -> Leaf:
    what = f'array {name!r} '
    if self.number(1) != 0x93:
      raise self.damaged(f'{what}is not of three parts')
    code = self.number(1)
    if not (0x90 <= code < 0xA0 or code == 0xDC):
      raise self.damaged(f'{what}has no shape')
    shape = tuple(self.count(what) for _ in range(code & 15 if code < 0xA0 else self.number(2)))
    dtype = _dtype(self.text())
    code = self.number(1)
    if dtype is None or code not in _BYTES:
      raise self.damaged(f'{what}has no known dtype, or no bytes')
    size = self.number(_BYTES[code])
    place = self.file.tell()
    if size != math.prod(shape) * dtype.itemsize or place + size != end:
      raise self.damaged(f'{what}has {size} bytes, which is not what {dtype}{list(shape)} takes')
    self.skip(size)
    return Leaf(name, shape, dtype, opener(self.path, place, dtype, name), place=place)

  def count(self, what: str) -> int:
    code = self.number(1)
    if code >= 0x80 and code not in (0xCC, 0xCD, 0xCE, 0xCF):
      raise self.damaged(f'{what}has no shape of counts')
    return code if code < 0x80 else self.number(_NUMBERS[code])


def _dtype(name: str) -> np.dtype | None:
  known: Any = getattr(ml_dtypes, name, None)
  try:
    dtype = np.dtype(known if isinstance(known, type) else name)
  except (TypeError, ValueError, SyntaxError):
    return None
  return None if dtype.hasobject or dtype.names or dtype.subdtype or not dtype.itemsize else dtype
