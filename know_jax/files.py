"""Small files that are never found half-written or altered: locks, atomic writes, sealed JSON."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from know_jax.errors import UserError

LOCK_SECONDS = 10.0
"""How long a writer waits for another process that writes the same path."""

_MAX_JSON_BYTES = 64 * 2**20
_NON_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def reason(error: OSError) -> str:
  """The operating system's own words for an error, such as 'No space left on device'."""
  return error.strerror or str(error)


def memory_bytes() -> int:
  """The memory of this machine: what says to be larger is not read."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def give_back_memory() -> None:
  """Returns what was freed to the system, where the C library keeps it for later."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:  # glibc has it.
    trim(0)


def processors() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def fsync_directory(path: Path) -> None:
  """Makes the names in a directory durable."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def hidden_sibling(path: Path, suffix: str) -> Path:
  """The name `.NAME.SUFFIX` beside `path`, for what must share its file system."""
  return path.with_name(f'.{path.name}.{suffix}')


@contextlib.contextmanager
def locked(path: Path, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
  """Holds the right to write `path` against other processes.

  The lock is a file beside `path`. The kernel drops it with the process, so a kill leaves none
  that holds; and it is a file, not the directory, because NFS locks nothing else.

  Args:
    path: what is to be written; its parent exists.
    wait_seconds: how long to wait for another holder.

  Raises:
    TimeoutError: another process, or another thread, still holds it then.
    OSError: the lock cannot be made (read-only directory, full disk).
  """
  name = hidden_sibling(path, 'lock')
  deadline = time.monotonic() + wait_seconds
  while True:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # The holder before us removed the file: a lock on a file without a name keeps nobody out.
      if os.path.samestat(os.fstat(fd), name.stat()):
        break
    except FileNotFoundError:
      pass
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        os.close(fd)
        raise
    os.close(fd)
    if time.monotonic() > deadline:
      raise TimeoutError('another process is writing it')
    time.sleep(0.01)
  try:
    yield
  finally:
    try:
      name.unlink(missing_ok=True)
    finally:
      os.close(fd)


def remove_tree(path: Path) -> None:
  """Removes a directory, and what writers of it that were killed left beside it, where it can."""
  prefix = hidden_sibling(path, '').name
  with contextlib.suppress(OSError), locked(path):
    beside = [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]
    if path.is_dir():
      # Under another name first: a kill half-way leaves nothing that looks like a whole one.
      doomed = hidden_sibling(path, 'removing')
      shutil.rmtree(doomed, ignore_errors=True)
      beside.append(path.rename(doomed))
    for entry in beside:
      # Not the lock, which is a file.
      shutil.rmtree(entry, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
  """Replaces a file's content, durably: a kill at any moment leaves the old or the new one.

  Raises:
    OSError: it cannot be written, or another process is; the old content is intact.
  """
  with locked(path), replacing(path) as file:
    file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
  """Gives a file to write, which becomes `path`, durably, when the block ends without an error.

  Raises:
    OSError: it cannot be written; the old content is intact.
  """
  temporary = hidden_sibling(path, 'tmp')
  try:
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  fsync_directory(path.parent)


def plain(value: Any, what: str) -> Any:
  """Turns a value into plain JSON data, without loss.

  Tuples become lists, and NumPy and JAX scalars the Python numbers they equal. Since JSON knows
  neither NaN nor infinities, these become the strings 'NaN', 'Infinity' and '-Infinity', which
  `float()` reads and `restored` turns back; a string that reads like that already is refused.

  Args:
    value: nested dicts (with string keys), lists, tuples and scalars.
    what: what the value is called in errors.

  Returns:
    Dicts, lists, strings, booleans, integers, finite floats and None.

  Raises:
    UserError: something in it cannot be kept; it is named.
  """
  if isinstance(value, dict):
    for key in value:
      if not isinstance(key, str):
        raise UserError(f'{what} has the key {key!r} of {type(key)}; wanted a string.')
    return {key: plain(entry, f'{what}.{key}') for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(entry, f'{what}[{i}]') for i, entry in enumerate(value)]
  if getattr(value, 'shape', None) == () and hasattr(value, 'item'):
    value = value.item()
  if isinstance(value, str):
    if value in _NON_FINITE:
      raise UserError(f'{what} is the string {value!r}, which stands for a number in JSON here.')
    return str(value)
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, int):
    return int(value)
  if isinstance(value, float):
    if math.isnan(value):
      return 'NaN'
    if math.isinf(value):
      return 'Infinity' if value > 0 else '-Infinity'
    return float(value)
  raise UserError(
    f'{what} is {value!r} of {type(value)}; wanted a dict, list, string, number, boolean or None.'
  )


def restored(value: Any) -> Any:
  """The inverse of `plain`: NaN and infinities from the strings that stand for them."""
  if isinstance(value, dict):
    return {key: restored(entry) for key, entry in value.items()}
  if isinstance(value, list):
    return [restored(entry) for entry in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def write_sealed(path: Path, content: dict[str, Any]) -> None:
  """Writes a JSON object with a checksum of itself, atomically.

  Args:
    path: the file.
    content: what `plain` takes, without the key `sha256`.

  Raises:
    OSError: it cannot be written; the old content is intact.
    UserError: `content` cannot be kept as JSON.
  """
  if 'sha256' in content:
    raise UserError(f'{path}: the key sha256 is taken by the checksum of the content itself.')
  write_atomic(path, _seal(plain(content, path.stem)))


def read_sealed(path: Path, what: str) -> dict[str, Any]:
  """Reads what `write_sealed` wrote; any altered byte is an error.

  Args:
    path: the file.
    what: what the file is called in errors, as in 'manifest'.

  Returns:
    The content, without the checksum.

  Raises:
    UserError: the file is missing, a link, unreadable, truncated, altered, or was never sealed.
  """
  damaged = f'{what} {path} is damaged or foreign: '
  try:
    # A link may lead to any file; what is sealed is written in its place.
    if path.is_symlink():
      raise UserError(f'{damaged}it is a link; wanted a plain file.')
    if not path.is_file():
      raise UserError(f'{what} {path} is missing.')
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
      raise UserError(f'{damaged}{size} bytes found, at most {_MAX_JSON_BYTES} wanted.')
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'cannot read {what} {path}: {reason(error)}.') from error
  try:
    found = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{damaged}{error or "nested too deep"}; wanted JSON.') from error
  if not isinstance(found, dict) or 'sha256' not in found:
    raise UserError(f'{damaged}it has no checksum of itself.')
  content = {key: value for key, value in found.items() if key != 'sha256'}
  try:
    content = restored(content)
    # Compared as bytes: JSON can be spelt in several ways (1e5, 1E5), and only one was written.
    intact = _seal(plain(content, what)) == data
  except RecursionError as error:
    raise UserError(f'{damaged}nested too deep.') from error
  if not intact:
    raise UserError(f'{damaged}its content does not have the checksum it states.')
  return content


def digest(value: Any) -> str:
  """The SHA-256 of JSON data, as hexadecimal digits; the order of keys does not matter.

  Raises:
    UserError: something in it is not what `plain` takes.
  """
  return hashlib.sha256(json.dumps(plain(value, 'value'), sort_keys=True).encode()).hexdigest()


def json_line(value: dict[str, Any], what: str) -> str:
  """One line of a `.jsonl` file, ended; NaN and infinities as in `plain`.

  Raises:
    UserError: something in it is not what `plain` takes.
  """
  return json.dumps(plain(value, what), allow_nan=False) + '\n'


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Reads a `.jsonl` file; a last line that a kill cut off is left out.

  Args:
    path: the file; a missing one is empty.

  Returns:
    A dict for each line.

  Raises:
    UserError: the file cannot be read, or a line before the last is no JSON object.
  """
  return _lines(path)[0]


def append_line(path: Path, value: dict[str, Any]) -> None:
  """Appends a line to a `.jsonl` file, durably; what a kill cut off before it is removed.

  Raises:
    UserError: the file is damaged or cannot be written, or the value is not JSON data.
  """
  line = json_line(value, path.stem).encode()
  try:
    with locked(path):
      existed, intact = path.exists(), _lines(path)[1]
      with path.open('ab') as file:
        file.truncate(intact)
        if intact and path.read_bytes()[-1:] != b'\n':
          file.write(b'\n')
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if not existed:
      fsync_directory(path.parent)
  except OSError as error:
    raise UserError(f'cannot write {path}: {reason(error)}.') from error


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
  """The lines of a `.jsonl` file, and the length of the file without a line that is cut off."""
  try:
    if path.exists() and not path.is_file():
      raise UserError(f'{path} is a folder or a device; wanted a file.')
    data = path.read_bytes() if path.exists() else b''
  except OSError as error:
    raise UserError(f'cannot read {path}: {reason(error)}.') from error
  found, length = [], 0
  lines = io.BytesIO(data).readlines()
  for number, line in enumerate(lines, 1):
    try:
      value = json.loads(line)
      if not isinstance(value, dict):
        raise ValueError('no JSON object')
      value = restored(value)
    except (ValueError, RecursionError) as error:
      # No beginning of a JSON object is one itself, so a line that parses is whole.
      if number == len(lines) and not line.endswith(b'\n'):
        break
      raise UserError(f'{path} is damaged: line {number} is no JSON object.') from error
    found.append(value)
    length += len(line)
  return found, length


def _seal(content: dict[str, Any]) -> bytes:
  checksum = hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
  return (json.dumps({**content, 'sha256': checksum}, indent=1, allow_nan=False) + '\n').encode()


class Journal:
  """What is done, by key: lines that are only ever added, so that a kill loses one entry."""

  def __init__(self, path: Path):
    self._path = path
    self._entries: dict[str, dict[str, Any]] = {}
    self.reload()

  def reload(self) -> None:
    """Reads also what other processes have added; of equal keys the first line counts."""
    lines = read_lines(self._path)
    for number, line in enumerate(lines, 1):
      if not isinstance(line.get('key'), str):
        raise UserError(f'{self._path} is damaged: line {number} has no key.')
    self._entries = {line['key']: line for line in reversed(lines)}

  def get(self, key: str) -> dict[str, Any] | None:
    """The entry of a key, None if there is none yet."""
    return self._entries.get(key)

  def add(self, key: str, **values: Any) -> dict[str, Any]:
    """Writes an entry, durably, and returns it."""
    entry = {'key': key, **values}
    append_line(self._path, entry)
    self._entries[key] = entry
    return entry
