"""A process of its own that reads arrays of an HDF5 file: `hdf5_child.py FILE LIMIT NAME...`.

`hdf5.py` starts it. It imports nothing of the package, so that it starts quickly. On stdout goes
one line of JSON, `{"arrays": [[dtype, shape, attributes], ...]}` and after it the bytes of the
arrays, or `{"error": "what is wrong"}`. `hdf5_child.py --list FILE START SIZE` is for a file in a
part of another, and gives `{"arrays": {name: [dtype, shape, place]}}` for all arrays of numbers,
with the place of their bytes in it, null where they are not in one piece; with a NAME after it, the
bytes of that array and nothing else.
"""

import contextlib
import io
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


def limit_memory() -> None:
  """Bounds the address space of this process."""
  with contextlib.suppress(ImportError, OSError, ValueError):  # Where the system has no limits.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main(path: str, limit: int, names: list[str]) -> None:
  """Writes the arrays of the names, or what is wrong with the first that cannot be read."""
  limit_memory()
  try:
    with h5py.File(path, 'r') as file:
      # Everything is checked before anything is read: shapes may be chosen to fill the memory.
      result = [_dataset(file, name, limit) for name in names]
      about = [[d.dtype.str, list(d.shape), sorted(map(str, d.attrs))] for d in result]
      arrays = [np.ascontiguousarray(data[()]) for data in result]
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
      raise _RefusedError(f'{name}: is a link to elsewhere; expected the data set itself.')
    if link is None:
      raise _RefusedError(f'{name}: is missing.')
    data = data[part]
  if not isinstance(data, h5py.Dataset):
    raise _RefusedError(f'{name}: is a group (sparse, or a struct); expected a full array.')
  if data.is_virtual or data.external:
    raise _RefusedError(
      f'{name}: keeps its values in other files; expected them in the file itself.'
    )
  if data.dtype.kind != 'f' or data.dtype.itemsize not in (4, 8):
    raise _RefusedError(f'{name}: has dtype {data.dtype}; expected real single or double numbers.')
  if data.shape is None:
    raise _RefusedError(f'{name}: has no values (a null data space); expected an array.')
  # A chunk is read as a whole, however little of it the data set has.
  for part, shape in (('shape', data.shape), ('chunks of shape', data.chunks or ())):
    # `math.prod` counts in Python's integers, which do not overflow.
    if math.prod(map(int, shape)) > limit:
      raise _RefusedError(f'{name}: has {part} {tuple(shape)}; expected at most {limit} numbers.')
  return data


class _Part(io.RawIOBase):
  """A stretch of a file as a file."""

  def __init__(self, path: str, start: int, size: int):
    self.file = open(path, 'rb')  # noqa: SIM115, PTH123
    self.start, self.size, self.place = start, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = 0) -> int:
    self.place = offset + (0, self.place, self.size)[whence]
    return self.place

  def tell(self) -> int:
    return self.place

  def readinto(self, buffer: Any) -> int:
    self.file.seek(self.start + self.place)
    data = self.file.read(max(min(len(buffer), self.size - self.place), 0))
    buffer[: len(data)] = data
    self.place += len(data)
    return len(data)


def _has_numbers(data: Any) -> bool:
  plain = not (data.dtype.names or data.dtype.subdtype)
  return data.shape is not None and data.dtype.kind in 'biufcV' and plain


def _arrays(group: Any, before: str, depth: int) -> Any:
  """Name -> data set of numbers in the file itself; links are refused."""
  if depth > 60:
    raise _RefusedError('its groups are nested too deep')
  for name in group:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
      raise _RefusedError(f'{before}{name} is a link to elsewhere')
    result = group[name]
    if isinstance(result, h5py.Group):
      yield from _arrays(result, f'{before}{name}/', depth + 1)
    elif isinstance(result, h5py.Dataset) and _has_numbers(result):
      if result.is_virtual or result.external:
        raise _RefusedError(f'{before}{name} keeps its values in other files')
      yield f'{before}{name}', result


def list_arrays(path: str, start: int, size: int, name: str | None) -> None:
  """Writes what arrays there are, or the bytes of one."""
  limit_memory()
  try:
    part = _Part(path, start, size)
    with h5py.File(part, 'r') as file:
      if name is not None:
        data = dict(_arrays(file, '', 0))[name]
        rows = max(1, (1 << 24) // max(math.prod(data.shape[1:]) * data.dtype.itemsize, 1))
        for row in range(0, data.shape[0], rows) if data.shape else ():
          sys.stdout.buffer.write(np.ascontiguousarray(data[row : row + rows]).tobytes())
        if not data.shape:
          sys.stdout.buffer.write(np.asarray(data[()]).tobytes())
        return
      result = {}
      for key, data in _arrays(file, '', 0):
        dtype = data.dtype.str
        if data.dtype.kind == 'V':
          dtype = 'bfloat16' if str(data.attrs.get('dtype')) == 'bfloat16' else dtype
        place = data.id.get_offset()
        if place is not None and data.size:
          # As the library reads it, or it is not taken from its place.
          part.seek(place)
          raw = part.read(data.dtype.itemsize)
          first = np.asarray(data[(0,) * data.ndim])
          place = place if raw == first.tobytes() else None
        result[key] = [dtype, list(data.shape), place]
  except Exception as error:  # Of no few types, as above.
    print(json.dumps({'error': f'not readable: {error}'}))
    return
  print(json.dumps({'arrays': result}))


if __name__ == '__main__':
  if sys.argv[1] == '--list':
    list_arrays(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), (*sys.argv[5:], None)[0])
  else:
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
