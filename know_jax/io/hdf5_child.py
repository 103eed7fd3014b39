"""A process of its own that reads arrays of an HDF5 file: `hdf5_child.py FILE LIMIT NAME...`.

`hdf5.py` starts it. It imports nothing of the package, so that it starts quickly. On stdout goes
one line of JSON, `{"arrays": [[dtype, shape, attributes], ...]}` and after it the bytes of the
arrays, or `{"error": "what is wrong"}`.
"""

import contextlib
import json
import math
import sys
from typing import Any

import h5py
import numpy as np

MEMORY_BYTES = 4 * 2**30
"""Address space; what a file may have us allocate beyond that fails."""


class _RefusedError(Exception):
  """What is wrong with a data set, said as the user sees it."""


def main(path: str, limit: int, names: list[str]) -> None:
  """Writes the arrays of the names, or what is wrong with the first that cannot be read."""
  with contextlib.suppress(ImportError, OSError, ValueError):  # Where the system has no limits.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  try:
    with h5py.File(path, 'r') as file:
      # Everything is looked at before anything is read: shapes may be chosen to fill the memory.
      found = [_dataset(file, name, limit) for name in names]
      about = [[d.dtype.str, list(d.shape), sorted(map(str, d.attrs))] for d in found]
      arrays = [np.ascontiguousarray(data[()]) for data in found]
  except _RefusedError as error:
    print(json.dumps({'error': str(error)}))
    return
  # What h5py raises for the ways in which a file can be damaged is of no few types.
  except Exception as error:
    print(json.dumps({'error': f'not readable: {error}'}))
    return
  sys.stdout.buffer.write(json.dumps({'arrays': about}).encode() + b'\n')
  for array in arrays:
    sys.stdout.buffer.write(array.tobytes())


def _dataset(file: Any, name: str, limit: int) -> Any:
  """A data set whose values lie in the file itself, with numbers and a size that can be read."""
  data = file
  for part in name.split('/'):
    link = data.get(part, getlink=True) if isinstance(data, h5py.Group) and part in data else None
    # Links are not followed: they may lead to other files.
    if link is not None and not isinstance(link, h5py.HardLink):
      raise _RefusedError(f'{name}: is a link to elsewhere; wanted the data set itself.')
    if link is None:
      raise _RefusedError(f'{name}: is missing.')
    data = data[part]
  if not isinstance(data, h5py.Dataset):
    raise _RefusedError(f'{name}: is a group (sparse, or a struct); wanted a full array.')
  if data.is_virtual or data.external:
    raise _RefusedError(f'{name}: keeps its values in other files; wanted them in the file itself.')
  if data.dtype.kind != 'f' or data.dtype.itemsize not in (4, 8):
    raise _RefusedError(f'{name}: has dtype {data.dtype}; wanted real single or double numbers.')
  if data.shape is None:
    raise _RefusedError(f'{name}: has no values (a null data space); wanted an array.')
  # A chunk is read as a whole, however little of it the data set has.
  for part, shape in (('shape', data.shape), ('chunks of shape', data.chunks or ())):
    # `math.prod` counts in Python's integers, which do not overflow.
    if math.prod(map(int, shape)) > limit:
      raise _RefusedError(f'{name}: has {part} {tuple(shape)}; wanted at most {limit} numbers.')
  return data


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
