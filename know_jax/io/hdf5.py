"""Arrays from HDF5 files of unknown origin, read in another process.

A crafted or damaged file can crash the HDF5 library, or have it take all memory or run for ever.
So it is a child process that opens it, with bounds on its memory and time.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from know_jax.errors import UserError

SECONDS = 120.0
"""How long a file may take."""

_CHILD = Path(__file__).with_name('hdf5_child.py')


class Array(NamedTuple):
  """A data set."""

  values: np.ndarray  # Float32 or float64.
  attributes: tuple[str, ...]  # The names of its attributes.


def read_arrays(path: Path, names: Sequence[str], *, limit: int, sort: str) -> dict[str, Array]:
  """Reads data sets of single or double numbers that lie in the file itself.

  Args:
    path: the file.
    names: of the data sets; of those in groups, keys joined by `/`.
    limit: more numbers in a data set, or a chunk of it, are refused unread.
    sort: what sort of file is expected, as errors say it.

  Returns:
    Name -> data set.

  Raises:
    UserError: h5py is not installed; or the file cannot be read, or a data set is missing, is a
      link or keeps its values in another file, or is no array of such numbers, or too large; file
      and data set are named.
  """
  unreadable = f'{path}: not a readable {sort} file'
  output = _in_child(path, [str(path.absolute()), str(limit), *names], unreadable)
  head, _, data = output.partition(b'\n')
  result = json.loads(head)
  if wrong := result.get('error'):
    known = any(wrong.startswith(f'{name}: ') for name in names)
    raise UserError(f'{path}: {wrong}' if known else f'{unreadable} ({wrong}).')
  arrays, start = {}, 0
  for name, (dtype, shape, attributes) in zip(names, result['arrays'], strict=True):
    values = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    arrays[name] = Array(values, tuple(attributes))
    start += values.nbytes
  return arrays


def list_arrays(path: Path, start: int, size: int) -> dict[str, tuple[str, list[int], int | None]]:
  """Name -> dtype, shape and place of the arrays of a file that lies in another, or is it.

  Args:
    path: the file.
    start: where in it the HDF5 file begins.
    size: how many bytes that has.

  Returns:
    The place counts from `start`; it is None for arrays that are compressed or in several pieces.

  Raises:
    UserError: h5py is not installed, or the file cannot be read.
  """
  unreadable = f'{path}: not a readable HDF5 file'
  output = _in_child(path, ['--list', str(path.absolute()), str(start), str(size)], unreadable)
  result = json.loads(output)
  if wrong := result.get('error'):
    raise UserError(f'{unreadable} ({" ".join(wrong.split())}).')
  return {name: tuple(entry) for name, entry in result['arrays'].items()}


def copy_array(path: Path, start: int, size: int, name: str, to: IO[bytes]) -> None:
  """Writes the numbers of an array to a file, in row-major order.

  Raises:
    UserError: the file cannot be read.
  """
  command = ['--list', str(path.absolute()), str(start), str(size), name]
  _in_child(path, command, f'{path}: cannot read array {name!r}', to)


def _in_child(
  path: Path, command: list[str], unreadable: str, to: IO[bytes] | None = None
) -> bytes:
  """What the child writes, in the end or to a file."""
  try:
    spec = importlib.util.find_spec('h5py')
  except ImportError:
    spec = None
  if spec is None or spec.origin is None:
    raise UserError(f'{path}: reading HDF5 files needs h5py; pip install h5py.')
  environment = {
    **os.environ,
    'PYTHONPATH': str(Path(spec.origin).parents[1]),
    # One thread, because each reserves memory; and no code is loaded that the file asks for.
    'OPENBLAS_NUM_THREADS': '1',
    'HDF5_PLUGIN_PRELOAD': '::',
  }
  try:
    done = subprocess.run(
      [sys.executable, '-P', str(_CHILD), *command],
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE if to is None else to,
      stderr=subprocess.PIPE,
      timeout=SECONDS,
    )
  except subprocess.TimeoutExpired as error:
    raise UserError(f'{unreadable}: it takes more than {SECONDS:g} seconds.') from error
  if done.returncode:
    last = (done.stderr.decode(errors='replace').strip().splitlines() or ['no message'])[-1]
    raise UserError(f'{unreadable}: the HDF5 library fails on it ({done.returncode}, {last}).')
  return done.stdout or b''
