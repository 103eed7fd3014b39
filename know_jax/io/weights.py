"""Weights in files, read and written a slice at a time: what all formats have in common.

A format is a module of this folder with `detect(path)` and `open(path)`, see `formats.py`. A
leaf is read by its offset in a file. Formats that do not have its bytes in one piece, such as
compressed ones, first copy it to a nameless file. Files are read by `pread`, and nothing of them
stays in memory. Headers are taken for hostile: nothing is read by an offset, a length or a file
name that has not been checked against the file.

A leaf's path is its name with `.` replaced by `/`: `model.dense.kernel` is `model/dense/kernel`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import numpy as np

from know_jax import showing
from know_jax.errors import UserError, os_errors, reason
from know_jax.io.files import file_checksum, replacing

_T = TypeVar('_T')

Mark = tuple[int, concurrent.futures.Future[Any]]
"""A size, and the checksum of what had been written then."""

_BLOCK = 1 << 20
_position = threading.Lock()


def _read_at(file: int, buffer: memoryview, place: int) -> int:
  if hasattr(os, 'preadv'):
    return os.preadv(file, [buffer], place)
  with _position:  # Windows: the descriptor has one position.
    os.lseek(file, place, os.SEEK_SET)
    data = os.read(file, len(buffer))
  buffer[: len(data)] = data
  return len(data)


def write_at(file: int, data: memoryview, place: int) -> None:
  """Writes bytes at a place of an open file."""
  while len(data):
    if hasattr(os, 'pwrite'):
      count = os.pwrite(file, data, place)
    else:
      with _position:
        os.lseek(file, place, os.SEEK_SET)
        count = os.write(file, data)
    data, place = data[count:], place + count


@dataclasses.dataclass(frozen=True)
class Reader:
  """One leaf, open for reading."""

  file: int  # The descriptor of a file in which the leaf's bytes lie in row-major order.
  offset: int  # Where in the file they begin.
  dtype: np.dtype  # Of the leaf.
  what: str  # What is read, for errors.

  def read(self, start: int, stop: int, into: np.ndarray | None = None) -> np.ndarray:
    """The elements `start` to `stop` of the leaf in row-major order: `[stop - start]`.

    Args:
      start: of the elements.
      stop: of the elements.
      into: an array of as many, in the leaf's dtype, that is filled; None: a new one.

    Raises:
      UserError: the file has been cut off, or cannot be read.
    """
    values = np.empty(stop - start, self.dtype) if into is None else into
    data = values.view(np.uint8)
    done, place = 0, self.offset + start * self.dtype.itemsize
    while done < data.size:
      try:
        count = _read_at(self.file, memoryview(data)[done:], place + done)
      except OSError as error:
        raise UserError(f'cannot read {self.what}: {reason(error)}.') from error
      if not count:
        raise UserError(f'cannot read {self.what}: the file has become shorter.')
      done += count
    return values


Opener = Callable[[Path], contextlib.AbstractContextManager[Reader]]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What is known of a leaf before it is read."""

  name: str  # As in the file.
  shape: tuple[int, ...]  # Its shape.
  # Its dtype; `V1` for bytes that NumPy has no dtype for, which can only be copied.
  dtype: np.dtype
  # `open(folder)` gives a context with its `Reader`; the folder is for a nameless file.
  open: Opener
  # What is held at once while it is opened: the chunks of Orbax are compressed.
  chunk_bytes: int = 0
  # Where its bytes begin in the file of its shard, None if they are not in one piece there.
  place: int | None = None

  @property
  def path(self) -> str:
    """Its name with `/` between the parts."""
    return self.name.replace('.', '/')

  @property
  def size(self) -> int:
    """The number of its elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes of its elements."""
    return self.size * self.dtype.itemsize


class Sink:
  """A file that is being written.

  Attributes:
    size: the bytes written.
    checksum: their SHA-256 so far.
  """

  def __init__(self, file: IO[bytes]):
    self._file = file
    self._begins = 0  # At how many of the bytes the file itself begins.
    self.size = 0
    self.checksum: Any = hashlib.sha256()

    self._thread: concurrent.futures.ThreadPoolExecutor | None = None
    self._pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    self._held: list[Any] = []
    self._held_bytes = 0

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: Any, *_: object) -> None:
    try:
      if kind is None:
        self.flush()
    finally:
      if self._thread is not None:
        self._thread.shutdown(cancel_futures=True)

  def begin(self, leaf: Leaf) -> None:
    """Says which leaf's elements are written next."""

  def write(self, data: bytes | np.ndarray) -> None:
    """Writes bytes, or the elements of an array in row-major order, which must stay as they are.

    Much at a time is written by a thread, while the caller computes what comes next.
    """
    # The view is needed because bfloat16 has no buffer interface.
    raw = raw_bytes(data).data if isinstance(data, np.ndarray) else data
    self.size += len(raw)
    self._held.append(raw)
    self._held_bytes += len(raw)
    if self._held_bytes >= _BLOCK // 4:
      self._submit(self._put, self._take_held())
      while len(self._pending) > 2:
        self._pending.popleft().result()

  def _take_held(self) -> list[Any]:
    held, self._held, self._held_bytes = self._held, [], 0
    return held

  def _submit(self, function: Callable[..., _T], *args: Any) -> concurrent.futures.Future[_T]:
    """Has the thread call a function after what it was told before."""
    if self._thread is None:
      self._thread = concurrent.futures.ThreadPoolExecutor(1)
    future = self._thread.submit(function, *args)
    self._pending.append(future)
    return future

  def _put(self, parts: Sequence[Any]) -> None:
    raw = parts[0] if len(parts) == 1 else b''.join(parts)
    self._file.write(raw)
    self.checksum.update(raw)

  def flush(self) -> None:
    """Waits until all is in the file and in the checksum.

    Raises:
      OSError: it cannot be written.
    """
    while self._pending:
      self._pending.popleft().result()
    if self._held:
      self._put(self._take_held())

  def identity(self) -> dict[str, Any]:
    """Size and SHA-256 of what has been written; of a folder also those of its `files`."""
    self.flush()
    return {'size': self.size, 'sha256': self.checksum.hexdigest()}

  def mark(self) -> Mark:
    """Where the file ends now; `go_back` returns to it."""
    # Nobody waits here until all is written: most marks are never returned to.
    self._submit(self._put, self._take_held())
    return self.size, self._submit(self.checksum.copy)

  def go_back(self, mark: Mark) -> None:
    """Takes back what was written after the mark."""
    self.flush()
    self.size, checksum = mark
    self.checksum = checksum.result().copy()
    self._file.seek(self.size - self._begins)
    self._file.truncate()


class _PatchSink(Sink):
  """A copy of a file in which leaves are replaced; they come in the order of their places."""

  def __init__(self, file: IO[bytes], source: IO[bytes]):
    super().__init__(file)
    self._source = source

  def begin(self, leaf: Leaf) -> None:
    assert leaf.place is not None
    self.copy(leaf.place)

  def copy(self, stop: int | None = None) -> None:
    """Copies the source from where the file ends now."""
    self._source.seek(self.size)
    while count := _BLOCK if stop is None else min(stop - self.size, _BLOCK):
      if not (data := self._source.read(count)):
        return
      self.write(data)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file, or a folder, of a checkpoint that is written as a whole."""

  name: str  # Of the file in the checkpoint's folder.
  paths: tuple[str, ...]  # Of its leaves, in the order in which they are written.
  # `writing(path)` gives a context with a `Sink`: what is at the path is replaced, durably and as a
  # whole, when the context is left without an error.
  writing: Callable[[Path], contextlib.AbstractContextManager[Sink]]


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of one stage."""

  path: Path  # As given.
  format: str  # The name of its format.
  leaves: dict[str, Leaf]  # Path -> leaf, sorted by path.
  shards: tuple[Shard, ...]  # How a copy of it with other values is written.
  # `identify()` reads all files and gives name -> size and SHA-256; sealed checkpoints are compared
  # with their manifests.
  identify: Callable[[], dict[str, dict[str, Any]]]
  metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # Free strings of its header.
  # The folder whose side files (configs, tokenizers) belong to it, None if it is a file.
  home: Path | None = None
  # The name and content of a sharded checkpoint's index.
  index: tuple[str, dict[str, Any]] | None = None
  notes: tuple[str, ...] = ()  # What to tell about it.
  # `seal(folder, metadata)` ends the writing of a checkpoint that states its own checksums.
  seal: Callable[[Path, dict[str, Any]], None] | None = None

  def __repr__(self) -> str:
    size = sum(leaf.nbytes for leaf in self.leaves.values())
    return showing.as_text(
      f'Weights in {self.path} ({self.format}), {size:,} bytes', showing.leaves_table(self.leaves)
    )


def by_path(leaves: Iterable[Leaf], where: Path) -> dict[str, Leaf]:
  """Path -> leaf, sorted by path.

  Raises:
    UserError: there is none, or two have the same path.
  """
  result: dict[str, Leaf] = {}
  for leaf in leaves:
    if not leaf.dtype.isnative or leaf.dtype.itemsize > 8 or leaf.dtype.kind in 'SUMm':
      leaf = _as_bytes(leaf)
    if (other := result.setdefault(leaf.path, leaf)) is not leaf:
      raise UserError(
        f'{where}: tensors {other.name!r} and {leaf.name!r} have the same path {leaf.path!r}.'
      )
  if not result:
    raise UserError(f'{where} holds no tensor.')
  return dict(sorted(result.items()))


def _as_bytes(leaf: Leaf) -> Leaf:
  """A leaf of a dtype that nothing computes with: big-endian, or wider than 64 bits."""

  @contextlib.contextmanager
  def opened(folder: Path) -> Iterator[Reader]:
    with leaf.open(folder) as reader:
      yield dataclasses.replace(reader, dtype=np.dtype('V1'))

  shape = (*leaf.shape, leaf.dtype.itemsize)
  return dataclasses.replace(leaf, shape=shape, dtype=np.dtype('V1'), open=opened)


def identify_files(root: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
  """Name -> size and SHA-256 of files, by their names relative to a folder.

  Raises:
    UserError: a file cannot be read.
  """
  result = {}
  for path in files:
    with os_errors(f'cannot read {path}'):
      entry = {'size': path.stat().st_size, 'sha256': file_checksum(path)}
      result[path.relative_to(root).as_posix()] = entry
  return result


def files_below(folder: Path) -> list[Path]:
  """All files in a folder and its subfolders."""
  return sorted(path for path in folder.rglob('*') if path.is_file())


def opener(path: Path, offset: int, dtype: np.dtype, name: str) -> Opener:
  """For a leaf whose bytes lie in one piece in a file."""
  return lambda _: _opened(path, offset, dtype, name)


@contextlib.contextmanager
def _opened(path: Path, offset: int, dtype: np.dtype, name: str) -> Iterator[Reader]:
  with os_errors(f'cannot read {path}'):
    file = os.open(path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0) | getattr(os, 'O_BINARY', 0))
  try:
    yield Reader(file, offset, dtype, f'tensor {name!r} of {path}')
  finally:
    os.close(file)


def copying(
  fill: Callable[[IO[bytes]], None], dtype: np.dtype, what: str, offset: int = 0
) -> Opener:
  """For a leaf whose bytes do not lie in one piece: they are first copied to a nameless file.

  Args:
    fill: `fill(file)` writes them, in row-major order.
    dtype: of the leaf.
    what: what is copied, for errors.
    offset: where in the nameless file they begin.
  """

  @contextlib.contextmanager
  def opened(folder: Path) -> Iterator[Reader]:
    failed = f'cannot copy {what} to {folder}'
    with contextlib.ExitStack() as stack:
      with os_errors(failed):
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        fill(file)
        file.flush()
      yield Reader(file.fileno(), offset, dtype, what)

  return opened


def of_file(
  path: Path,
  format: str,
  leaves: Sequence[Leaf],
  *,
  given: Path | None = None,
  finish: Callable[[IO[bytes]], None] | None = None,
  notes: Iterable[str] = (),
) -> Weights:
  """The weights of one file, which is written as a copy of it with its leaves replaced.

  Args:
    path: the file.
    format: the name of its format.
    leaves: in the order of their places. Where one has none, no such copy can be written.
    given: the folder that was given in place of the file, whose side files belong to it.
    finish: as in `patching`.
    notes: what to tell about it.

  Raises:
    UserError: as `by_path` does.
  """
  is_whole = all(leaf.place is not None for leaf in leaves)
  return Weights(
    given or path,
    format,
    by_path(leaves, given or path),
    (shard_of(path, leaves, finish),) if is_whole else (),
    lambda: identify_files(path.parent, [path]),
    home=given,
    notes=tuple(notes),
  )


def shard_of(
  path: Path, leaves: Sequence[Leaf], finish: Callable[[IO[bytes]], None] | None = None
) -> Shard:
  """A shard that is a copy of a file with these leaves of it replaced; they are in its order."""
  return Shard(path.name, tuple(leaf.path for leaf in leaves), patching(path, finish))


def patching(source: Path, finish: Callable[[IO[bytes]], None] | None = None) -> Any:
  """The `writing` of a shard that is a copy of a file with its leaves replaced in their places.

  Args:
    source: the file that is copied.
    finish: what is done with the file when all is written, such as mending checksums.
  """

  @contextlib.contextmanager
  def writing(path: Path) -> Iterator[Sink]:
    with (
      source.open('rb') as old, replacing(path) as file, _PatchSink(file, old) as sink
    ):  # fmt: skip
      yield sink
      sink.copy()
      sink.flush()
      if finish is not None:
        finish(file)
        file.flush()
        with Path(file.name).open('rb') as written:
          sink.checksum = hashlib.file_digest(written, 'sha256')

  return writing


def raw_bytes(data: np.ndarray) -> np.ndarray:
  """The bytes of an array in row-major order."""
  return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def read_json(data: bytes, what: str) -> dict[str, Any]:
  """A JSON object in which no name stands twice.

  Raises:
    UserError: it is something else.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for name in result:
      name.encode()  # JSON can hold halves of characters, which no file should.
    if len(result) != len(pairs):
      raise ValueError('a name stands twice in it')
    return result

  try:
    content = json.loads(data.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    text = str(error) if not isinstance(error, RecursionError) else 'nested too deep'
    raise UserError(f'{what}: {text}; expected JSON.') from error
  if not isinstance(content, dict):
    raise UserError(f'{what}: found JSON of another form; expected an object.')
  return content
