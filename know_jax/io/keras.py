"""Keras: .keras, .weights.h5 and .h5; HDF5 itself is read in another process.

Keras 3 numbers the variables of a layer. Where the layer leaves no doubt they get the names that
Keras gives them elsewhere (`layers/dense/vars/0` is `layers/dense/kernel`): these tell the kinds.
The state of an optimiser is no leaf: it is copied.
"""

import functools
import math
import re
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from know_jax.errors import UserError
from know_jax.io import hdf5, zipped
from know_jax.io.weights import Leaf, Opener, Weights, copying, of_file, opener

_INNER = 'model.weights.h5'
_SIGNATURE = b'\x89HDF\r\n\x1a\n'
_OPTIMIZER = re.compile(r'^_?optimizer(_weights)?/')
_KERNEL = re.compile(r'dense|conv|einsum|linear|proj|head|logits|query|key|value|(^|_)fc')
_VARIABLE = re.compile(r'^(.*?)/?vars/([0-9]+)$')


def detect(path: Path) -> bool:
  """Whether a path is an HDF5 file, or a zip archive with Keras's weights."""
  if not path.is_file():
    return False
  with path.open('rb') as file:
    head = file.read(8)
  if head == _SIGNATURE:
    return True
  return _INNER in (zipped.names(path) or ())


def open(path: Path) -> Weights:
  """Lists the arrays.

  Raises:
    UserError: h5py is not installed; the file is damaged, or its weights are packed in it.
  """
  start, size, members = 0, path.stat().st_size, []
  if _INNER in (zipped.names(path) or ()):
    member = zipped.members(path)[_INNER]
    if not member.stored:
      raise UserError(f'{path}: {_INNER} is compressed in it; save it again by Keras.')
    start, size, members = member.start, member.size, [member]
  arrays = {
    name: array
    for name, array in hdf5.list_arrays(path, start, size).items()
    if not _OPTIMIZER.match(name)
  }
  names = _names(arrays)
  leaves, reached = [], 0
  for name, (text, shape, place) in sorted(arrays.items(), key=lambda item: item[1][2] or 0):
    dtype = np.dtype(ml_dtypes.bfloat16 if text == 'bfloat16' else text)
    if dtype.kind == 'V' and text != 'bfloat16':
      dtype, shape = np.dtype('V1'), [*shape, dtype.itemsize]
    nbytes = math.prod(shape) * dtype.itemsize
    if place is not None and (place < reached or place + nbytes > size):
      raise UserError(f'{path}: not a readable HDF5 file ({name} lies in another, or is cut off).')
    reached = reached if place is None else place + nbytes
    at = None if place is None else start + place
    open_it = (
      _copier(path, start, size, name, dtype, nbytes)
      if at is None
      else opener(path, at, dtype, name)
    )
    leaves.append(Leaf(names[name], tuple(shape), dtype, open_it, place=at))
  notes = []
  if any(leaf.place is None for leaf in leaves):
    notes = [f'{path} has compressed arrays: what is predicted from it is written in safetensors.']
  finish = functools.partial(zipped.mend, changed=members) if members else None
  return of_file(path, 'keras', leaves, finish=finish, notes=notes)


def _copier(path: Path, start: int, size: int, name: str, dtype: np.dtype, nbytes: int) -> Opener:
  what = f'array {name!r} of {path}'

  def fill(file: IO[bytes]) -> None:
    hdf5.copy_array(path, start, size, name, file)
    if file.seek(0, 2) != nbytes:
      raise UserError(f'cannot read {what}: its numbers are not all there.')

  return copying(fill, dtype, what)


def _names(arrays: dict[str, Any]) -> dict[str, str]:
  """Name in the file -> name by which the kind is told."""
  layers: dict[str, dict[int, str]] = {}
  names = {name: name.removesuffix(':0') for name in arrays}
  for name in arrays:
    if variable := _VARIABLE.match(name):
      layers.setdefault(variable[1], {})[int(variable[2])] = name
  for layer, variables in layers.items():
    ordered = [variables[number] for number in sorted(variables)]
    told = _told(layer.rpartition('/')[2], [len(arrays[name][1]) for name in ordered])
    if sorted(variables) == list(range(len(told or ()))):
      for name, new in zip(ordered, told or (), strict=True):
        names[name] = f'{layer}/{new}' if layer else new
  return names


def _told(layer: str, ranks: list[int]) -> tuple[str, ...] | None:
  """The names of a layer's variables, of these ranks; None where they cannot be told."""
  if 'normalization' in layer and all(rank == 1 for rank in ranks):
    return ('gamma', 'beta', 'moving_mean', 'moving_variance')[: len(ranks)]
  if 'separable' in layer and ranks[:2] in ([3, 3], [4, 4]):
    return ('depthwise_kernel', 'pointwise_kernel', 'bias')[: len(ranks)]
  if len(ranks) == 1 and ranks[0] > 1:
    if 'embedding' in layer:
      return ('embeddings',)
    # The variable of a layer of the user's, or of PReLU, may be anything.
    return ('kernel',) if ranks[0] > 3 or _KERNEL.search(layer) else None
  if len(ranks) == 2 and ranks[0] > ranks[1] >= 1:
    return ('kernel', 'bias')
  # The bias of a GRU has two rows.
  is_recurrent = ranks in ([2, 2, 1], [2, 2, 2])
  return ('kernel', 'recurrent_kernel', 'bias') if is_recurrent else None
