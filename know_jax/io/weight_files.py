"""Weights in files, read and written a stretch at a time: safetensors, sharded or not, and Orbax.

A tensor's path is its name with `.` replaced by `/`: `model.dense.kernel` is `model/dense/kernel`,
by which kinds are told. Names as Flax gives them are so told apart; PyTorch's `dense.weight` is not
Flax's `dense/kernel` (see `kinds.find_kinds`). Orbax joins the keys of a tree by `.` too.

The safetensors library maps files into memory, and every page it has looked at counts as resident;
here files are read by `pread`, and nothing of them stays. A tensor of an Orbax checkpoint is copied
to a nameless file first, chunk by chunk. Headers are taken for hostile: nothing is read by an
offset, a length or a file name that has not been checked against the file.
Format: https://github.com/huggingface/safetensors#format.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, reason
from know_jax.io import checkpoints
from know_jax.io.files import replacing

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
"""The dtypes of safetensors that are read and written. NumPy's are little-endian wherever JAX runs,
as the format's are."""

INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Reader:
  """One tensor, open for reading.

  Attributes:
    file: the descriptor of a file in which the tensor's bytes lie in row-major order.
    offset: where in the file they begin.
    dtype: of the tensor.
    what: what is read, for errors.
  """

  file: int
  offset: int
  dtype: np.dtype
  what: str

  def read(self, start: int, stop: int) -> np.ndarray:
    """The elements `start` to `stop` of the tensor in row-major order: `[stop - start]`.

    Raises:
      UserError: the file has been cut off, or cannot be read.
    """
    data = np.empty((stop - start) * self.dtype.itemsize, np.uint8)
    done, place = 0, self.offset + start * self.dtype.itemsize
    while done < data.size:
      try:
        count = os.preadv(self.file, [memoryview(data)[done:]], place + done)
      except OSError as error:
        raise UserError(f'cannot read {self.what}: {reason(error)}.') from error
      if not count:
        raise UserError(f'cannot read {self.what}: the file has become shorter.')
      done += count
    return data.view(self.dtype)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What is known of a tensor before it is read.

  Attributes:
    name: as in the file.
    shape: its shape.
    dtype: its dtype.
    chunk_bytes: what is held at once while it is opened: the chunks of Orbax are compressed.
    open: `open(folder)` gives a context with its `Reader`; the folder is for a nameless file.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  open: Callable[[Path], contextlib.AbstractContextManager[Reader]]
  chunk_bytes: int = 0

  @property
  def size(self) -> int:
    """The number of its elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes of its elements."""
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of one stage.

  Attributes:
    path: as given.
    leaves: path -> leaf, sorted by path.
    metadata: the free strings of the first safetensors header.
    identify: `identify()` reads all files and gives name -> size and SHA-256; checkpoints of ours
      are compared with their manifests.
  """

  path: Path
  leaves: dict[str, Leaf]
  metadata: dict[str, str]
  identify: Callable[[], dict[str, dict[str, Any]]]


def open_weights(path: str | os.PathLike) -> Weights:
  """Finds the tensors of a stage; reads headers and metadata, no weights.

  Args:
    path: a safetensors file; an index of shards (`model.safetensors.index.json`); a folder with
      one of those; a checkpoint of ours; or a plain Orbax checkpoint, with or without OCDBT.

  Raises:
    UserError: there is nothing of the kind, it cannot be read, or its header is damaged or of
      unknown dtypes; the file and the tensor are named.
  """
  given = Path(path).expanduser()
  try:
    if given.is_dir():
      return _open_folder(given)
    if not given.is_file():
      raise UserError(f'{given}: no such file or folder; wanted the weights of a stage.')
    if given.name.endswith('.json'):
      return _open_index(given, given)
    return _open_safetensors(given, {given: None}, given)
  except OSError as error:
    raise UserError(f'cannot read {given}: {reason(error)}.') from error


def _open_folder(folder: Path) -> Weights:
  if (folder / _MANIFEST).is_file():
    checkpoints.read_metadata(folder)  # An error, if the manifest is of something else.
    return _open_orbax(folder, folder / 'weights', lambda: checkpoints.verify(folder))
  if (folder / INDEX).is_file():
    return _open_index(folder / INDEX, folder)
  files = sorted(folder.glob('*.safetensors'))
  if (folder / _SINGLE) in files or len(files) == 1:
    file = folder / _SINGLE if len(files) > 1 else files[0]
    return _open_safetensors(folder, {file: None}, folder)
  if files:
    raise UserError(
      f'{folder} has {len(files)} safetensors files and no {INDEX}; wanted an index, or the path '
      'of one file.'
    )
  if any((folder / name).exists() for name in ('_METADATA', 'manifest.ocdbt')):
    return _open_orbax(folder, folder, lambda: _identify(folder, _files_below(folder)))
  raise UserError(
    f'{folder} holds no weights: found neither a safetensors file, nor {INDEX}, nor the _METADATA '
    f'of an Orbax checkpoint, nor the {_MANIFEST} of a checkpoint of know_jax.'
  )


def _files_below(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file())


def _identify(root: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
  found = {}
  for path in files:
    try:
      with path.open('rb') as file:
        checksum = hashlib.file_digest(file, 'sha256').hexdigest()
        found[path.relative_to(root).as_posix()] = {
          'size': os.fstat(file.fileno()).st_size,
          'sha256': checksum,
        }
    except OSError as error:
      raise UserError(f'cannot read {path}: {reason(error)}.') from error
  return found


def _add(leaves: dict[str, Leaf], leaf: Leaf, where: Path) -> None:
  path = leaf.name.replace('.', '/')
  if path in leaves:
    raise UserError(
      f'{where}: tensors {leaves[path].name!r} and {leaf.name!r} have the same path {path!r}.'
    )
  leaves[path] = leaf


# --- safetensors ----------------------------------------------------------------------------------


def _open_index(index: Path, given: Path) -> Weights:
  content = _json(index.read_bytes(), f'{index}')
  weight_map = content.get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index}: no index of safetensors files: it has no weight_map.')
  files: dict[Path, set[str] | None] = {}
  for name, file in weight_map.items():
    # A plain name: an index must not lead to files of other folders.
    if not isinstance(file, str) or file in ('', '.', '..') or Path(file).name != file:
      raise UserError(
        f'{index}: tensor {name!r} is said to be in {file!r}; wanted the name of a file beside it.'
      )
    names = files.setdefault(index.with_name(file), set())
    assert names is not None
    names.add(name)
  return _open_safetensors(given, files, index.parent)


def _open_safetensors(given: Path, files: Mapping[Path, set[str] | None], where: Path) -> Weights:
  """Files and, where an index says so, the tensors that each must have."""
  leaves: dict[str, Leaf] = {}
  metadata: dict[str, str] = {}
  for number, file in enumerate(sorted(files)):
    tensors, of_file = _read_header(file)
    metadata = of_file if number == 0 else metadata
    wanted = files[file]
    if wanted is not None and (other := sorted(wanted ^ tensors.keys())):
      lacks, has = (file, 'the index') if other[0] in wanted else ('the index', file)
      raise UserError(f'{given}: {lacks} lacks tensor {other[0]!r}, which {has} has.')
    for leaf in tensors.values():
      _add(leaves, leaf, where)
  if not leaves:
    raise UserError(f'{given} holds no tensor.')
  root = where if where.is_dir() else where.parent
  return Weights(
    given, dict(sorted(leaves.items())), metadata, lambda: _identify(root, sorted(files))
  )


def _read_header(path: Path) -> tuple[dict[str, Leaf], dict[str, str]]:
  """The tensors of a file, whose bytes must fill it without gap or overlap, and its metadata."""
  damaged = f'{path}: not a readable safetensors file: '
  try:
    with path.open('rb') as file:
      status = os.fstat(file.fileno())
      if not stat.S_ISREG(status.st_mode):
        raise UserError(f'{damaged}it is no plain file.')
      length = int.from_bytes(file.read(8), 'little') if status.st_size >= 8 else 0
      if not 2 <= length <= min(_MAX_HEADER, status.st_size - 8):
        raise UserError(
          f'{damaged}its header is said to have {length} bytes; wanted 2 to {_MAX_HEADER}, and no '
          f'more than the {max(status.st_size - 8, 0)} that follow.'
        )
      text = file.read(length)
      if not text.startswith(b'{'):
        raise UserError(f'{damaged}its header begins with {text[:1]!r}; wanted an opening brace.')
      header = _json(text, damaged.removesuffix(': '))
  except OSError as error:
    raise UserError(f'cannot read {path}: {reason(error)}.') from error
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise UserError(f'{damaged}its __metadata__ is no mapping to strings.')
  places = {name: _place(entry, f'{damaged}tensor {name!r} ') for name, entry in header.items()}
  reached, last = 0, ''
  for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
    if begin != reached:
      raise UserError(
        f'{damaged}tensor {name!r} begins at byte {begin}; wanted {reached}, where '
        f'{f"tensor {last!r}" if last else "the header"} ends.'
      )
    reached, last = end, name
  if reached != (data := status.st_size - 8 - length):
    raise UserError(f'{damaged}its tensors take {reached} bytes; found {data}.')
  leaves = {
    name: Leaf(name, shape, dtype, _file_opener(path, 8 + length + begin, dtype, name))
    for name, (dtype, shape, begin, _) in places.items()
  }
  return leaves, metadata


def _json(data: bytes, what: str) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name in found:
      name.encode()  # JSON can hold halves of characters, which no file should.
    if len(found) != len(pairs):
      raise ValueError('a name stands twice in it')
    return found

  try:
    content = json.loads(data.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    text = str(error) if not isinstance(error, RecursionError) else 'nested too deep'
    raise UserError(f'{what}: {text}; wanted JSON.') from error
  if not isinstance(content, dict):
    raise UserError(f'{what}: found JSON of another form; wanted an object.')
  return content


def _place(entry: Any, what: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """dtype, shape, begin and end of a tensor."""

  def counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

  if not isinstance(entry, dict) or not entry.keys() >= {'dtype', 'shape', 'data_offsets'}:
    raise UserError(f'{what}is not described by dtype, shape and data_offsets.')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise UserError(f'{what}has dtype {dtype!r}; wanted one of {", ".join(DTYPES)}.')
  if not counts(shape) or not counts(offsets) or len(offsets) != 2:
    raise UserError(f'{what}has shape {shape!r} and data_offsets {offsets!r}; wanted counts.')
  begin, end = offsets
  wanted = math.prod(shape) * DTYPES[dtype].itemsize
  if end - begin != wanted:
    raise UserError(f'{what}has {end - begin} bytes; wanted {wanted}, for {dtype}{shape}.')
  return DTYPES[dtype], tuple(shape), begin, end


def _file_opener(
  path: Path, offset: int, dtype: np.dtype, name: str
) -> Callable[[Path], contextlib.AbstractContextManager[Reader]]:
  @contextlib.contextmanager
  def opened(_: Path) -> Iterator[Reader]:
    with _open_to_read(path) as file:
      yield Reader(file.fileno(), offset, dtype, f'tensor {name!r} of {path}')

  return opened


def _open_to_read(path: Path) -> IO[bytes]:
  try:
    return path.open('rb')
  except OSError as error:
    raise UserError(f'cannot read {path}: {reason(error)}.') from error


def _raw(data: np.ndarray) -> np.ndarray:
  """The bytes of an array in row-major order."""
  return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


class Sink:
  """A file that is being written.

  Attributes:
    size: the bytes written.
    checksum: their SHA-256 so far.
  """

  def __init__(self, file: IO[bytes]):
    self._file = file
    self.size = 0
    self.checksum = hashlib.sha256()

  def write(self, data: bytes | np.ndarray) -> None:
    """Writes bytes, or the elements of an array in row-major order."""
    # The view is needed because bfloat16 has no buffer interface.
    raw = _raw(data).data if isinstance(data, np.ndarray) else data
    self._file.write(raw)
    self.checksum.update(raw)
    self.size += len(raw)

  def mark(self) -> tuple[int, Any]:
    """Where the file ends now; `go_back` returns to it."""
    return self.size, self.checksum.copy()

  def go_back(self, mark: tuple[int, Any]) -> None:
    """Takes back what was written after the mark."""
    self.size, checksum = mark
    self.checksum = checksum.copy()
    self._file.seek(self.size)
    self._file.truncate()


@contextlib.contextmanager
def writing(path: Path, leaves: Sequence[Leaf], metadata: Mapping[str, str]) -> Iterator[Sink]:
  """Writes a safetensors file: whole and durable, or not at all.

  Args:
    path: the file; what is there is replaced when the block is left without an error.
    leaves: the tensors, by name, shape and dtype, in the order in which their bytes follow; see
      `file_order`.
    metadata: free strings for its header.

  Yields:
    A `Sink` for the bytes of the tensors.

  Raises:
    OSError: the file cannot be written.
  """
  header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  end = 0
  for leaf in leaves:
    offsets, end = [end, end + leaf.nbytes], end + leaf.nbytes
    header[leaf.name] = {
      'dtype': _NAMES[leaf.dtype], 'shape': list(leaf.shape), 'data_offsets': offsets
    }  # fmt: skip
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with replacing(path) as file:
    sink = Sink(file)
    sink.write(len(text).to_bytes(8, 'little') + text)
    yield sink
    if sink.size != 8 + len(text) + end:
      raise AssertionError(f'{path}: {sink.size} bytes written for {8 + len(text) + end}')


def file_order(leaves: Sequence[Leaf]) -> list[Leaf]:
  """The order of tensors in a file that keeps each aligned: wide dtypes first, then by name."""
  return sorted(leaves, key=lambda leaf: (-leaf.dtype.itemsize, leaf.name))


# --- Orbax ----------------------------------------------------------------------------------------


def _open_orbax(
  given: Path, directory: Path, identify: Callable[[], dict[str, dict[str, Any]]]
) -> Weights:
  import tensorstore as ts

  base = f'file://{directory.resolve().as_posix()}/'
  ocdbt = (directory / 'manifest.ocdbt').exists()
  store: dict[str, Any] = {'driver': 'ocdbt', 'base': base} if ocdbt else {'driver': 'file'}
  root = '' if ocdbt else f'{directory.resolve().as_posix()}/'
  leaves: dict[str, Leaf] = {}
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
      if dtype not in _NAMES:
        raise UserError(
          f'{given}: leaf {name!r} has dtype {dtype}; wanted one of '
          f'{", ".join(d.name for d in _NAMES)}.'
        )
      shape = tuple(array.shape)
      chunk = tuple(min(c, s) for c, s in zip(_chunk_shape(array), shape, strict=True))
      chunk_bytes = math.prod(chunk) * dtype.itemsize
      opener = _orbax_opener(spec, chunk, f'leaf {name!r} of {given}')
      _add(leaves, Leaf(name, shape, dtype, opener, chunk_bytes), given)
  except (ValueError, RuntimeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'cannot read {given}: {_first_line(error)}') from error
  if not leaves:
    raise UserError(f'{given} holds no leaf: the Orbax checkpoint is empty, or none.')
  return Weights(given, dict(sorted(leaves.items())), {}, identify)


def _chunk_shape(array: Any) -> tuple[int, ...]:
  return tuple(array.chunk_layout.read_chunk.shape or array.shape)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _orbax_opener(
  spec: dict[str, Any], chunk: tuple[int, ...], what: str
) -> Callable[[Path], contextlib.AbstractContextManager[Reader]]:
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
