"""Small files that are never found half-written or altered: locks, atomic writes, sealed JSON."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from know_jax.errors import UserError

try:
  import fcntl
except ImportError:
  import msvcrt

  def _lock(fd: int) -> None:
    msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:

  def _lock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


LOCK_SECONDS = 10.0
"""How long a writer waits for another process that writes the same path."""


_URL = re.compile('([A-Za-z][A-Za-z0-9+.-]+):/')  # A `Path` has one slash of the two.


def local_path(path: str | os.PathLike, what: str) -> Path:
  """A path on this machine, with `~` for the home folder.

  Args:
    path: as the user gave it; `file://` is taken off.
    what: what is given, for the error: '--output'.

  Raises:
    UserError: it is a URL of another place, such as `gs://bucket`.
  """
  text = os.fspath(path)
  if scheme := _URL.match(text):
    if scheme[1] != 'file':
      raise UserError(
        f'{what}: found {text!r}; expected a path on this machine. Copy it here first, or mount it '
        '(gcsfuse, mountpoint-s3, rclone).'
      )
    text = '/' + text[scheme.end() :].lstrip('/')
  try:
    return Path(text).expanduser()
  except RuntimeError as error:
    raise UserError(f'{what}: {text!r} begins with a home folder that is unknown here.') from error


def fsync_directory(path: Path) -> None:
  """Makes the names in a directory durable, where the system has that for directories."""
  if not hasattr(os, 'O_DIRECTORY'):
    return
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def fsync_tree(root: Path) -> None:
  """Makes all files and names in a directory and those below it durable.

  Raises:
    OSError: one of them cannot be read or synchronised.
  """
  for directory, _, files in os.walk(root, topdown=False, onerror=raise_error):
    for name in files:
      with Path(directory, name).open('rb') as file:
        os.fsync(file.fileno())
    fsync_directory(Path(directory))


def raise_error(error: OSError) -> None:
  """The `onerror` of an `os.walk` that leaves nothing out."""
  raise error


def file_checksum(path: Path) -> str:
  """The SHA-256 of a file's content, as hexadecimal digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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
    fd = os.open(name, os.O_RDWR | os.O_CREAT | getattr(os, 'O_CLOEXEC', 0), 0o666)
    try:
      _lock(fd)
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
      # Windows refuses, as the file is open; then it stays, and locks as well as a new one.
      with contextlib.suppress(PermissionError):
        name.unlink(missing_ok=True)
    finally:
      os.close(fd)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
  """Keeps other processes from work in a folder that one alone can do.

  Raises:
    UserError: another one is at it.
  """
  with contextlib.ExitStack() as stack:
    try:
      # One that was just killed may still be ending.
      stack.enter_context(locked(folder / 'work', wait_seconds=3.0))
    except TimeoutError as error:
      raise UserError(
        f'{folder}: another process is working here; wait until it has ended, or take another '
        'folder.'
      ) from error
    yield


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
    with temporary.open('w+b') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  fsync_directory(path.parent)
