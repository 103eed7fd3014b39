"""NumPy's .npz: arrays by their names, read in their places unless they are compressed."""

import io
import math
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from know_jax.errors import UserError
from know_jax.io import zipped
from know_jax.io.weights import Leaf, Opener, Weights, copying, of_file, opener

MAX_HEADER = 10_000
# NumPy writes bfloat16 as two bytes of no type; nothing else of two bytes has no name of its own.
BFLOAT16 = np.dtype('V2')
_FORTRAN = re.compile(rb"'fortran_order': True")  # Of one length with what replaces it.


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
  leaves, notes, headers = [], [], list[tuple[int, int]]()
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
      dtype, shape, begin, transposed = read_header(head, what)
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
        opened = array_opener(path, place, dtype, name, transposed)
        leaves.append(Leaf(name, shape, dtype, opened, place=place))
        headers += [(member.start, begin)] if transposed else []
      else:
        opened = _unpacker(path, member_name, begin, dtype, what, transposed)
        leaves.append(Leaf(name, shape, dtype, opened))
  ordered = sorted(leaves, key=lambda leaf: leaf.place or 0)

  def finish(file: IO[bytes]) -> None:
    in_c_order(file, headers)
    zipped.mend(file, members.values())

  return of_file(path, 'npz', ordered, finish=finish, notes=notes)


_Shape = tuple[int, ...]


def read_header(head: bytes, what: str) -> tuple[np.dtype, _Shape, int, _Shape | None]:
  """What a header of .npy states: dtype, shape, its length; the shape again of Fortran's order."""
  data = io.BytesIO(head)
  with zipped.reading(f'{what}has no readable header'):
    version = np.lib.format.read_magic(data)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
    }[version]  # fmt: skip
    shape, fortran, dtype = read(data)
  if dtype.hasobject or dtype.names:
    raise UserError(f'{what}holds Python objects or records ({dtype}); expected numbers.')
  is_fortran = fortran and 0 not in shape and sum(n != 1 for n in shape) > 1
  if is_fortran and not _FORTRAN.search(head[: data.tell()]):
    raise UserError(f"{what}is in Fortran's order, by a header that NumPy does not write.")
  return dtype, tuple(shape), data.tell(), tuple(shape) if is_fortran else None


def array_opener(
  path: Path, place: int, dtype: np.dtype, what: str, transposed: _Shape | None
) -> Opener:
  """For an array at a place of a file; `transposed` is the shape of one in Fortran's order."""
  if transposed is None:
    return opener(path, place, dtype, what)

  def fill(file: IO[bytes]) -> None:
    file.write(_in_c_order(np.memmap(path, np.uint8, 'r'), place, dtype, transposed))

  return copying(fill, dtype, what)


def _in_c_order(data: Any, place: int, dtype: np.dtype, shape: _Shape) -> bytes:
  return np.ndarray(shape, f'V{dtype.itemsize}', data, place, order='F').tobytes()


def in_c_order(file: IO[bytes], headers: Sequence[tuple[int, int]]) -> None:
  """Has headers, each of a start and a length, say that their arrays are in C's order."""
  for start, length in headers:
    file.seek(start)
    head = file.read(length)
    file.seek(start)
    file.write(_FORTRAN.sub(b"'fortran_order':False", head, count=1))


def _unpacker(
  path: Path,
  member: str,
  begin: int,
  dtype: np.dtype,
  what: str,
  transposed: _Shape | None,
) -> Opener:
  """As `array_opener`, for a compressed array."""

  def fill(file: IO[bytes]) -> None:
    with (
      zipped.reading(f'{what}cannot be unpacked'),
      zipfile.ZipFile(path) as archive,
      archive.open(member) as packed,
    ):
      if transposed is None:
        shutil.copyfileobj(packed, file, 1 << 20)
        return
      whole = packed.read()
      file.write(whole[:begin])
      file.write(_in_c_order(whole, begin, dtype, transposed))

  return copying(fill, dtype, what.strip(), begin)
