"""Orbax: StandardCheckpointer's folders, steps of a CheckpointManager, and know_jax's sealed ones.

Any tree will do, that of Flax NNX included. Orbax joins the keys of a tree by `.`, and keeps arrays
in compressed chunks, with or without OCDBT. An array is copied to a nameless file chunk by chunk.
"""

import contextlib
import functools
import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from know_jax.errors import UserError, first_line
from know_jax.io import checkpoints
from know_jax.io.files import fsync_directory, fsync_tree, hidden_sibling
from know_jax.io.weights import (
  Leaf,
  Opener,
  Shard,
  Sink,
  Weights,
  by_path,
  copying,
  files_below,
  identify_files,
  raw_bytes,
  write_at,
)
from know_jax.jsonable import digest

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
    return _open(path, path / 'weights', lambda: checkpoints.verify(path), seal=_seal)
  folder = path
  if not _is_plain(path):
    items = {item.name: item for item in _items(path)}
    name = next(iter(items)) if len(items) == 1 else next((n for n in _ITEMS if n in items), None)
    if name is None:
      raise UserError(f'{path} has the items {", ".join(items)}; expected the path of one.')
    folder = items[name]
  return _open(path, folder, lambda: identify_files(path, files_below(folder)))


def _open(
  given: Path,
  directory: Path,
  identify: Callable[[], dict[str, dict[str, Any]]],
  seal: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Weights:
  import tensorstore as ts

  base = f'file://{directory.resolve().as_posix()}/'
  ocdbt = (directory / 'manifest.ocdbt').exists()
  store: dict[str, Any] = {'driver': 'ocdbt', 'base': base} if ocdbt else {'driver': 'file'}
  root = '' if ocdbt else f'{directory.resolve().as_posix()}/'
  leaves, specs = [], {}
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
      chunk_shape: Any = array.chunk_layout.read_chunk.shape or shape
      chunk = tuple(min(c, s) for c, s in zip(chunk_shape, shape, strict=True))
      chunk_bytes = math.prod(chunk) * dtype.itemsize
      opener = _opener(spec, chunk, dtype, f'leaf {name!r} of {given}')
      leaves.append(Leaf(name, shape, dtype, opener, chunk_bytes))
      specs[name] = {'driver': spec['driver']}, chunk
  except (ValueError, RuntimeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'cannot read {given}: {first_line(error)}') from error
  result = by_path(leaves, given)
  name = directory.relative_to(given).as_posix()
  writing = functools.partial(_writing, directory, ocdbt, specs)
  if name != '.' and seal is None:
    writing = functools.partial(_with_step, given, directory, writing)
  shards = (Shard(name, tuple(result), writing),)
  return Weights(given, 'orbax', result, shards, identify, seal=seal)


def _opener(spec: dict[str, Any], chunk: tuple[int, ...], dtype: np.dtype, what: str) -> Opener:
  def fill(file: IO[bytes]) -> None:
    import tensorstore as ts

    try:
      array = ts.open(spec, open=True, read=True).result()
      for part in _chunks(tuple(array.shape), chunk):
        _copy(file.fileno(), array[part].read().result(), tuple(array.shape), part)
    except (ValueError, RuntimeError) as error:
      raise UserError(f'cannot read {what}: {first_line(error)}') from error

  return copying(fill, dtype, what)


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
    write_at(file, rows[index].data, where * data.dtype.itemsize)


# --- writing --------------------------------------------------------------------------------------

_OF_OCDBT = re.compile(r'^(manifest\.ocdbt$|d/|ocdbt\.process_[0-9]+/)')


class _Sink(Sink):
  """Writes arrays into a new checkpoint; each is put together in a nameless file first."""

  def __init__(
    self, store: Callable[[str], dict[str, Any]], specs: dict[str, Any], scratch: IO[bytes]
  ):
    super().__init__(scratch)
    self._store, self._specs = store, specs
    self._leaf: Leaf | None = None
    self.files: dict[str, Any] = {}

  def begin(self, leaf: Leaf) -> None:
    self.end()
    self.flush()
    self._leaf, self._begins = leaf, self.size
    self._file.seek(0)
    self._file.truncate()

  def end(self) -> None:
    """Takes the leaf that has been written into the checkpoint."""
    import tensorstore as ts

    if (leaf := self._leaf) is None or not leaf.size:
      return
    self.flush()
    self._file.flush()
    spec, chunk = self._specs[leaf.name]
    array = ts.open({**spec, 'kvstore': self._store(f'{leaf.name}/')}, open=True).result()
    data = np.memmap(self._file, leaf.dtype, 'r', shape=leaf.shape)
    for part in _chunks(leaf.shape, chunk):
      array[part].write(data[part]).result()

  def identity(self) -> dict[str, Any]:
    size = sum(file['size'] for file in self.files.values())
    return {'size': size, 'sha256': digest(self.files), 'files': self.files}


@contextlib.contextmanager
def _writing(source: Path, ocdbt: bool, specs: dict[str, Any], path: Path) -> Iterator[Sink]:
  """A copy of a checkpoint, with its metadata and chunks but other numbers."""
  import tensorstore as ts

  temporary = hidden_sibling(path, 'tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  try:

    def store(folder: Path, key: str = '') -> dict[str, Any]:
      place = folder.resolve().as_posix()
      if ocdbt:
        return {'driver': 'ocdbt', 'base': f'file://{place}/', 'path': key}
      return {'driver': 'file', 'path': f'{place}/{key}'}

    for file in files_below(source):
      name = file.relative_to(source).as_posix()
      if not _OF_OCDBT.match(name) if ocdbt else not _is_chunk(name, specs):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, temporary / name)
    if ocdbt:
      old, new = (ts.KvStore.open(store(folder)).result() for folder in (source, temporary))
      for key in old.list().result():
        if not _is_chunk(key.decode(), specs):
          new.write(key, old.read(key).result().value).result()
    with (
      tempfile.TemporaryFile(dir=temporary.parent) as scratch,
      _Sink(functools.partial(store, temporary), specs, scratch) as sink,
    ):
      yield sink
      sink.end()
    sink.files = identify_files(temporary, files_below(temporary))
    fsync_tree(temporary)
    path.mkdir(parents=True, exist_ok=True)
    # What says that it is a checkpoint comes last.
    for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name in _SIGNS):
      target = path / entry.name
      if target.is_dir():
        shutil.rmtree(target)
      entry.replace(target)
    fsync_directory(path)
  except (ValueError, RuntimeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'cannot write {path}: {first_line(error)}') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _is_chunk(key: str, specs: dict[str, Any]) -> bool:
  parts = key.split('/')
  inside = any('/'.join(parts[:n]) in specs for n in range(1, len(parts)))
  return inside and not parts[-1].startswith(('.z', 'zarr.json'))


@contextlib.contextmanager
def _with_step(
  given: Path,
  directory: Path,
  writing: Callable[[Path], contextlib.AbstractContextManager[Sink]],
  path: Path,
) -> Iterator[Sink]:
  """Beside an item also what else a step of a CheckpointManager has, other arrays left out."""
  with writing(path) as sink:
    yield sink
  for entry in given.iterdir():
    if entry.is_file():
      shutil.copyfile(entry, path.with_name(entry.name))
    elif entry != directory and not _is_plain(entry):
      shutil.copytree(entry, path.with_name(entry.name), dirs_exist_ok=True)


def _seal(folder: Path, metadata: dict[str, Any]) -> None:
  leaves = {}
  for path, leaf in _open(folder, folder / 'weights', dict).leaves.items():
    with leaf.open(folder.parent) as reader:
      checksum = hashlib.sha256()
      for start in range(0, leaf.size, 1 << 20):
        checksum.update(raw_bytes(reader.read(start, min(start + (1 << 20), leaf.size))).data)
    leaves[path] = {
      'shape': list(leaf.shape), 'dtype': leaf.dtype.name, 'sha256': checksum.hexdigest()
    }  # fmt: skip
  checkpoints.seal(folder, leaves, metadata)
