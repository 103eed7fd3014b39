"""Equinox: .eqx files of `eqx.tree_serialise_leaves`, arrays of NumPy one after the other.

They have no names. An array is called by its number, and what the layers of Equinox write together
by the names of their parts: a matrix, or a convolution, and the vector of its outputs after it are
`weight` and `bias`, and so are two equal vectors, those of a normalisation. Vectors and scalars
that remain have no kind but by a rule of the user's.
"""

import functools
import math
import os
from pathlib import Path
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np

from know_jax.errors import UserError
from know_jax.io import npz
from know_jax.io.weights import Leaf, Weights, of_file

_MAGIC = b'\x93NUMPY'


def detect(path: Path) -> bool:
  """Whether a path is a file of several .npy arrays, or one called .eqx."""
  if not path.is_file():
    return False
  with path.open('rb') as file:
    if file.read(len(_MAGIC)) != _MAGIC:
      return False
    if path.suffix == '.eqx':
      return True
    file.seek(0)
    try:
      _array(file, path, 0)
    except UserError:
      return False
    return bool(file.read(1))


def open(path: Path) -> Weights:
  """Reads the headers of the arrays.

  Raises:
    UserError: one is damaged or cut off, or holds Python objects.
  """
  arrays: list[_Array] = []
  with path.open('rb') as file:
    size = os.fstat(file.fileno()).st_size
    while file.tell() < size:
      arrays.append(_array(file, path, len(arrays)))
  names, leaves = _names([array.shape for array in arrays]), []
  for name, (dtype, shape, place, transposed, _) in zip(names, arrays, strict=True):
    opened = npz.array_opener(path, place, dtype, name, transposed)
    leaves.append(Leaf(name, shape, dtype, opened, place=place))
  headers = [array.header for array in arrays if array.transposed]
  note = (
    f'an .eqx file has no names: its {len(arrays)} arrays are called by their numbers, and taken '
    'for weights, biases and norms by their order and shapes, as the table of leaves shows.'
  )
  finish = functools.partial(npz.in_c_order, headers=headers)
  return of_file(path, 'equinox', leaves, finish=finish, notes=[note])


class _Array(NamedTuple):
  dtype: np.dtype
  shape: tuple[int, ...]
  place: int
  transposed: tuple[int, ...] | None  # The shape of one in Fortran's order.
  header: tuple[int, int]  # Start and length.


def _array(file: IO[bytes], path: Path, number: int) -> _Array:
  """The array that begins here; the file is left at its end."""
  begin, what = file.tell(), f'{path}: array {number} '
  dtype, shape, header, transposed = npz.read_header(file.read(npz.MAX_HEADER), what)
  place, nbytes = begin + header, math.prod(shape) * dtype.itemsize
  if place + nbytes > os.fstat(file.fileno()).st_size:
    raise UserError(f'{what}is cut off: {dtype}{list(shape)} takes {nbytes} bytes.')
  file.seek(place + nbytes)
  if dtype == npz.BFLOAT16:
    dtype = np.dtype(ml_dtypes.bfloat16)
  return _Array(dtype, shape, place, transposed, (begin, header))


def _names(shapes: list[tuple[int, ...]]) -> list[str]:
  """The numbers of arrays, with the names of their parts where these can be told."""
  names = [f'{n}.weight' if len(shape) > 1 else str(n) for n, shape in enumerate(shapes)]
  number = 0
  while number + 1 < len(shapes):
    first, second, *rest = shapes[number : number + 4]
    outputs = math.prod(second)
    # The bias of a convolution is [outputs, 1, 1].
    is_bias = len(first) > 1 and bool(second) and outputs == max(second) == first[0] > 0
    # Two vectors after a matrix are a normalisation, three a bias and a normalisation.
    is_norm_next = rest[:1] == [second] and rest[1:2] != [second]
    if (is_bias and not is_norm_next) or (len(first) == 1 and first == second):
      names[number : number + 2] = f'{number}.weight', f'{number}.bias'
      number += 1
    number += 1
  return names
