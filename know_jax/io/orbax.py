"""Orbax: StandardCheckpointer's folders, steps of a CheckpointManager, and know_jax's sealed ones.

Any tree will do, that of Flax NNX included. Orbax joins the keys of a tree by `.`, and keeps arrays
in compressed chunks, with or without OCDBT. An array is copied to a nameless file chunk by chunk.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.errors import UserError, reason
from know_jax.io import checkpoints
from know_jax.io.weights import Leaf, Opener, Reader, Weights, by_path, files_below, identify_files

_MANIFEST = 'manifest.json'
_SIGNS = ('_METADATA', 'manifest.ocdbt')
_ITEMS = ('default', 'params', 'model', 'state')
"""Of several items in a step of a CheckpointManager the first of these is taken."""


def detect(path: Path) -> bool:
  """Whether a path is a folder that Orbax, or `know_jax.io.checkpoints`, wrote."""
  return path.is_dir() and ((path / _MANIFEST).is_file() or _is_plain(path) or bool(_items(path)))


def _is_plain(folder: Path) -> bool:
  return any((folder / name).exists() for name in _SIGNS)


def _items(folder: Path) -> list[Path]:
  """The items with arrays in a step of a CheckpointManager."""
  if not (folder / '_CHECKPOINT_METADATA').exists():
    return []
  return sorted(item for item in folder.iterdir() if item.is_dir() and _is_plain(item))


def open(path: Path) -> Weights:
  """Reads the metadata of a stage.

  Raises:
    UserError: it is damaged, or a step has several items and none with a usual name.
  """
  if (path / _MANIFEST).is_file():
    checkpoints.read_metadata(path)  # An error, if the manifest is of something else.
    return _open(path, path / 'weights', lambda: checkpoints.verify(path))
  folder = path
  if not _is_plain(path):
    items = {item.name: item for item in _items(path)}
    name = next(iter(items)) if len(items) == 1 else next((n for n in _ITEMS if n in items), None)
    if name is None:
      raise UserError(f'{path} has the items {", ".join(items)}; wanted the path of one.')
    folder = items[name]
  return _open(path, folder, lambda: identify_files(path, files_below(folder)))


def _open(
  given: Path, directory: Path, identify: Callable[[], dict[str, dict[str, Any]]]
) -> Weights:
  import tensorstore as ts

  base = f'file://{directory.resolve().as_posix()}/'
  ocdbt = (directory / 'manifest.ocdbt').exists()
  store: dict[str, Any] = {'driver': 'ocdbt', 'base': base} if ocdbt else {'driver': 'file'}
  root = '' if ocdbt else f'{directory.resolve().as_posix()}/'
  leaves = []
  try:
    keys = ts.KvStore.open(store if ocdbt else {**store, 'path': root}).result().list().result()
    for key in sorted(key.decode() for key in keys):
      name, _, file = key.rpartition('/')
      if file not in ('.zarray', 'zarr.json') or not name:
        continue
      spec = {
        'driver': 'zarr' if file == '.zarray' else 'zarr3',
        'kvstore': {**store, 'path': f'{root}{name}/'},
        # A lost chunk would read as zeros.
        'fill_missing_data_reads': False,
      }
      array = ts.open(spec, open=True, read=True).result()
      dtype = np.dtype(array.dtype.numpy_dtype)
      shape = tuple(array.shape)
      chunk = tuple(min(c, s) for c, s in zip(_chunk_shape(array), shape, strict=True))
      chunk_bytes = math.prod(chunk) * dtype.itemsize
      opener = _opener(spec, chunk, f'leaf {name!r} of {given}')
      leaves.append(Leaf(name, shape, dtype, opener, chunk_bytes))
  except (ValueError, RuntimeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'cannot read {given}: {_first_line(error)}') from error
  return Weights(given, 'orbax', by_path(leaves, given), (), identify)


def _chunk_shape(array: Any) -> tuple[int, ...]:
  return tuple(array.chunk_layout.read_chunk.shape or array.shape)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _opener(spec: dict[str, Any], chunk: tuple[int, ...], what: str) -> Opener:
  @contextlib.contextmanager
  def opened(folder: Path) -> Iterator[Reader]:
    import tensorstore as ts

    with tempfile.TemporaryFile(dir=folder) as file:
      try:
        array = ts.open(spec, open=True, read=True).result()
        for part in _chunks(tuple(array.shape), chunk):
          _copy(file.fileno(), array[part].read().result(), tuple(array.shape), part)
      except OSError as error:
        raise UserError(f'cannot copy {what} to {folder}: {reason(error)}.') from error
      except (ValueError, RuntimeError) as error:
        raise UserError(f'cannot read {what}: {_first_line(error)}') from error
      yield Reader(file.fileno(), 0, np.dtype(array.dtype.numpy_dtype), what)

  return opened


def _chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
  """The chunks of an array of that shape."""
  counts = [-(-s // c) if c else 0 for s, c in zip(shape, chunk, strict=True)]
  for index in np.ndindex(*counts):
    yield tuple(
      slice(i * c, min((i + 1) * c, s)) for i, c, s in zip(index, chunk, shape, strict=True)
    )


def _copy(file: int, data: np.ndarray, shape: tuple[int, ...], part: tuple[slice, ...]) -> None:
  """Writes a part of an array to where it belongs in row-major order."""
  # The axes from `lead` on are whole, so that the part has runs of bytes that belong together.
  lead = len(shape)
  while lead > 0 and data.shape[lead - 1 :] == shape[lead - 1 :]:
    lead -= 1
  lead = max(lead - 1, 0)
  rows = np.ascontiguousarray(data).reshape(*data.shape[:lead], -1).view(np.uint8)
  steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  for index in np.ndindex(*data.shape[:lead]):
    where = sum((s.start + i) * step for s, i, step in zip(part, index, steps, strict=False))
    where += sum(s.start * step for s, step in zip(part[lead:], steps[lead:], strict=True))
    run, place = rows[index].data, where * data.dtype.itemsize
    while len(run):
      count = os.pwrite(file, run, place)
      run, place = run[count:], place + count
