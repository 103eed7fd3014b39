"""NumPy's .npz: arrays by their names, read in their places unless they are compressed."""

import functools
import io
import math
import shutil
import zipfile
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from know_jax.errors import UserError
from know_jax.io import zipped
from know_jax.io.weights import Leaf, Opener, Weights, copying, of_file, opener

MAX_HEADER = 10_000
# NumPy writes bfloat16 as two bytes of no type; nothing else of two bytes has no name of its own.
BFLOAT16 = np.dtype('V2')


def detect(path: Path) -> bool:
  """Whether a path is a zip archive of .npy files."""
  names = zipped.names(path) or []
  return bool(names) and all(name.endswith('.npy') for name in names)


def open(path: Path) -> Weights:
  """Reads the headers of the arrays.

  Raises:
    UserError: the archive or a header is damaged, or an array holds Python objects.
  """
  members = zipped.members(path)
  leaves, notes = [], []
  with path.open('rb') as file, zipfile.ZipFile(path) as archive:
    for member_name, member in members.items():
      name = member_name.removesuffix('.npy')
      what = f'{path}: array {name!r} '
      if member.stored:
        file.seek(member.start)
        head = file.read(min(member.size, MAX_HEADER))
        size = member.size
      else:
        with zipped.reading(f'{what}cannot be unpacked'), archive.open(member_name) as packed:
          head = packed.read(MAX_HEADER)
        size = archive.getinfo(member_name).file_size
      dtype, shape, begin = read_header(head, what)
      if math.prod(shape) * dtype.itemsize != size - begin:
        raise UserError(
          f'{what}has {size - begin} bytes; expected {math.prod(shape) * dtype.itemsize}, for '
          f'{dtype}{list(shape)}.'
        )
      if dtype == BFLOAT16:
        dtype = np.dtype(ml_dtypes.bfloat16)
        notes.append(f'{what}has two-byte numbers without a name, as bfloat16 has: taken for that.')
      if member.stored:
        place = member.start + begin
        leaves.append(Leaf(name, shape, dtype, opener(path, place, dtype, name), place=place))
      else:
        leaves.append(Leaf(name, shape, dtype, _unpacker(path, member_name, begin, dtype, what)))
  ordered = sorted(leaves, key=lambda leaf: leaf.place or 0)
  finish = functools.partial(zipped.mend, changed=members.values())
  return of_file(path, 'npz', ordered, finish=finish, notes=notes)


def read_header(head: bytes, what: str) -> tuple[np.dtype, tuple[int, ...], int]:
  """Dtype and shape that a header of .npy states, and its length.

  Of an array in Fortran's order it is the shape of the transpose, whose bytes are in C's order.
  """
  data = io.BytesIO(head)
  with zipped.reading(f'{what}has no readable header'):
    version = np.lib.format.read_magic(data)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
    }[version]  # fmt: skip
    shape, fortran, dtype = read(data)
  if dtype.hasobject or dtype.names:
    raise UserError(f'{what}holds Python objects or records ({dtype}); expected numbers.')
  return dtype, tuple(shape[::-1] if fortran else shape), data.tell()


def _unpacker(path: Path, member: str, begin: int, dtype: np.dtype, what: str) -> Opener:
  def fill(file: IO[bytes]) -> None:
    with (
      zipped.reading(f'{what}cannot be unpacked'),
      zipfile.ZipFile(path) as archive,
      archive.open(member) as packed,
    ):
      shutil.copyfileobj(packed, file, 1 << 20)

  return copying(fill, dtype, what.strip(), begin)
