"""Checkpoints: an Orbax checkpoint with a checksum of every leaf and file, replaced atomically.

The format that runs of know_jax write for themselves; checkpoints of plain Orbax are read in
`io/orbax.py`. Longer than other files, because saving, sealing, checking and restoring share one
manifest, and the order of their steps is what survives a kill. A checkpoint is a directory with

```
weights/        a plain Orbax checkpoint: ocp.StandardCheckpointer().restore(path / 'weights')
manifest.json   format, shape, dtype and SHA-256 of every leaf, size and SHA-256 of every file,
                the caller's metadata, and the SHA-256 of all that
```

Arrays that lie on several processes are written by them all, each its own shards; of such leaves
plain Orbax wants a target to restore them to, unless the devices are those of the save.

Orbax restores flipped bits and casts dtypes without a word, so nothing is handed to it before every
file has the checksum that the manifest states, and nothing to the caller before every leaf has.
The checksums find damage, not forgery: whoever can write the files can also write the manifest.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from know_jax import trees
from know_jax.errors import UserError, first_line, os_errors
from know_jax.io.files import (
  file_checksum,
  fsync_directory,
  fsync_tree,
  hidden_sibling,
  local_path,
  locked,
  raise_error,
)
from know_jax.io.sealed import read_sealed, write_sealed
from know_jax.jsonable import digest, plain
from know_jax.system.machine import memory_bytes
from know_jax.system.processes import check_same, from_first, in_all
from know_jax.system.signals import uninterrupted

PyTree = Any

FORMAT = 'know_jax checkpoint'
VERSION = 1

_WEIGHTS = 'weights'
_MANIFEST = 'manifest.json'
_BLOCK = 2**20


def save(
  path: str | os.PathLike,
  tree: PyTree,
  *,
  metadata: dict[str, Any] | None = None,
  overwrite: bool = False,
) -> Path:
  """Saves a tree of arrays; a kill at any moment leaves the old checkpoint or the new one.

  Everything is written to a hidden directory beside `path`, made durable, and renamed. What a
  killed save left is removed by the next save of the same path. SIGINT and SIGTERM wait for the
  end of the save. Of several processes all call it, with one tree and a path that all of them see;
  each writes its shards of arrays that are spread over them, process 0 all else.

  Args:
    path: the directory to be made; its parents are made too.
    tree: nested dicts (string keys) of NumPy or JAX arrays of any shape but empty and any numeric
      dtype, sharded or replicated over devices of one process or of all.
    metadata: JSON data (dicts, lists, strings, numbers, booleans, None) kept in the manifest; that
      of process 0.
    overwrite: whether an existing checkpoint is replaced; else it is an error.

  Returns:
    The absolute path of the checkpoint.

  Raises:
    UserError: the tree cannot be saved (the leaf is named), the path is taken, the operating system
      refuses (its reason is given), or processes differ in the weights. What was there before is
      intact.
  """
  path = _absolute(path)
  leaves = in_all(lambda: _host_leaves(tree))
  content: dict[str, Any] = {
    'format': FORMAT,
    'version': VERSION,
    'leaves': {
      name: {'shape': list(leaf.shape), 'dtype': leaf.dtype.name, 'sha256': _leaf_checksum(leaf)}
      for name, leaf in trees.named_leaves(leaves).items()
    },
    'files': {},
    'metadata': metadata or {},
  }
  plain(content, 'checkpoint')  # An error in the metadata comes before any writing.
  sums = {name: leaf['sha256'] for name, leaf in content['leaves'].items()}
  check_same(sums, f'cannot save checkpoint {path}: the checksum of leaves')
  stack = contextlib.ExitStack()

  def lock() -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(path))

  def begin() -> str:
    _clean_up(path)
    _check_free(path, overwrite)
    temporary = hidden_sibling(path, f'saving-{secrets.token_hex(4)}')
    stack.callback(_remove, temporary)
    temporary.mkdir()
    _check_space(temporary, leaves)
    return temporary.name

  def finish() -> None:
    content['files'] = _checksums(temporary)
    fsync_tree(temporary)
    write_sealed(temporary / _MANIFEST, content)
    _commit(temporary, path)

  with os_errors(f'cannot save checkpoint {path}'), stack:
    from_first(lock)
    with uninterrupted():
      temporary = path.with_name(from_first(begin))
      in_all(lambda: _orbax_save(path, temporary / _WEIGHTS, leaves))
      from_first(finish)
  return path


def seal(path: Path, leaves: dict[str, dict[str, Any]], metadata: dict[str, Any]) -> None:
  """Writes the manifest of a checkpoint whose `weights/` another has written.

  Args:
    path: the folder, with all files that belong to it.
    leaves: path -> `shape`, `dtype` and `sha256` of the leaf's bytes in row-major order.
    metadata: as for `save`.

  Raises:
    OSError: it cannot be written.
  """
  (path / _MANIFEST).unlink(missing_ok=True)
  content = {
    'format': FORMAT,
    'version': VERSION,
    'leaves': leaves,
    'files': _checksums(path),
    'metadata': metadata,
  }
  write_sealed(path / _MANIFEST, content)


def restore(path: str | os.PathLike, *, like: PyTree | None = None) -> PyTree:
  """Restores a tree that `save` wrote, bit for bit, with every file and leaf verified.

  Of several processes all call it.

  Args:
    path: the checkpoint's directory.
    like: a tree of arrays or `jax.ShapeDtypeStruct`s that the checkpoint must agree with in
      structure, shapes and dtypes.

  Returns:
    Nested dicts of NumPy arrays: they keep 64-bit dtypes where JAX would narrow them, and are
    tied to no device, so that the number of devices and of processes may differ from that at the
    time of saving.

  Raises:
    UserError: the checkpoint is missing, foreign, of another format version, incomplete or
      altered, or differs from `like`; the file or leaf is named, with what was found and expected.
  """
  path = _absolute(path)
  with os_errors(f'cannot read checkpoint {path}'):
    home = _home(path)
    manifest = _read_manifest(path, home)
    _check_files(path, home, manifest['files'])
    stored = sum(file['size'] for file in manifest['files'].values())
    tree = _orbax_restore(path, home / _WEIGHTS, manifest['leaves'], stored)
  _check_leaves(path, tree, manifest['leaves'], checksums=True)
  if like is not None:
    trees.check_same(like, tree, names=('the tree expected', f'checkpoint {path}'))
  return tree


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
  """The metadata given to `save`, from the verified manifest; the weights are not read.

  Raises:
    UserError: as in `restore`, as far as the manifest goes.
  """
  path = _absolute(path)
  with os_errors(f'cannot read checkpoint {path}'):
    return _read_manifest(path, _home(path))['metadata']


def weights_digest(path: str | os.PathLike) -> str:
  """Identifies the weights of a checkpoint: equal for equal names, shapes, dtypes and bits.

  Returns:
    64 hexadecimal digits, from the verified manifest; the weights are not read.

  Raises:
    UserError: as in `restore`, as far as the manifest goes.
  """
  path = _absolute(path)
  with os_errors(f'cannot read checkpoint {path}'):
    return digest(_read_manifest(path, _home(path))['leaves'])


def verify(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """Compares every file of a checkpoint with its manifest, for readers of parts of its `weights/`.

  Returns:
    The files: name -> `size` and `sha256`.

  Raises:
    UserError: as in `restore`, as far as the files go.
  """
  path = _absolute(path)
  with os_errors(f'cannot read checkpoint {path}'):
    home = _home(path)
    files = _read_manifest(path, home)['files']
    _check_files(path, home, files)
  return files


def exists(path: str | os.PathLike) -> bool:
  """Whether there is a checkpoint at a path, intact or not.

  Raises:
    UserError: the operating system does not let us look.
  """
  path = _absolute(path)
  with os_errors(f'cannot read checkpoint {path}'):
    return (_home(path) / _MANIFEST).is_file()


# -- the tree ------------------------------------------------------------------------------------


def _host_leaves(tree: PyTree) -> PyTree:
  """The tree with NumPy arrays for leaves, but for those that no process has all of."""
  if not isinstance(tree, dict):
    raise UserError(f'cannot save a tree of {type(tree)}; expected nested dicts of arrays.')
  seen: dict[str, tuple[str, ...]] = {}

  def convert(node: Any, keys: tuple[str, ...]) -> Any:
    name = '/'.join(keys)
    if isinstance(node, dict):
      for key in node:
        if not isinstance(key, str):
          raise UserError(f'key {key!r} in {name!r} is of {type(key)}; expected a string.')
      return {key: convert(child, (*keys, key)) for key, child in node.items()}
    # Orbax joins keys by dots for its file names; two leaves of one name overwrite each other.
    for separator in './':
      joined = separator + separator.join(keys)
      if (other := seen.setdefault(joined, keys)) != keys:
        raise UserError(f'leaves {other} and {keys} share one name when joined by {separator!r}.')
    return _host_leaf(node, name)

  host = convert(tree, ())
  if not seen:
    raise UserError('cannot save a tree without leaves.')
  return host


def _host_leaf(leaf: Any, name: str) -> np.ndarray | jax.Array:
  if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
    raise UserError(
      f'leaf {name!r} is of {type(leaf)}; expected a NumPy or JAX array, in nested dicts.'
    )
  dtype = leaf.dtype
  numeric = jnp.issubdtype(dtype, np.number) or dtype == np.bool_
  if not numeric or not getattr(dtype, 'isnative', True):
    raise UserError(
      f'leaf {name!r} has dtype {dtype}; expected numbers in native byte order '
      '(of a random key: jax.random.key_data).'
    )
  if leaf.size == 0:
    raise UserError(f'leaf {name!r} is empty, of shape {leaf.shape}; Orbax keeps no empty arrays.')
  if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    return leaf
  return np.asarray(leaf)


def _leaf_checksum(leaf: np.ndarray | jax.Array) -> str:
  if isinstance(leaf, jax.Array):
    # One leaf at a time: nobody needs room for all of the model.
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  # Bytes in row-major order; all platforms of JAX are little-endian. The view is needed because
  # bfloat16 and its like have no buffer interface.
  return hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)).hexdigest()


def _check_leaves(
  path: Path, tree: PyTree, expected: dict[str, dict[str, Any]], *, checksums: bool
) -> None:
  """Compares leaves, or Orbax's descriptions of them, with the manifest."""
  result = trees.named_leaves(tree)
  if result.keys() != expected.keys():
    name = sorted(result.keys() ^ expected.keys())[0]
    where = ('weights', 'manifest') if name in result else ('manifest', 'weights')
    raise UserError(
      f'checkpoint {path} is damaged: leaf {name!r} is in its {where[0]}, not in its {where[1]}.'
    )
  for name, leaf in result.items():
    have = {'shape': list(leaf.shape), 'dtype': np.dtype(leaf.dtype).name}
    if checksums:
      have['sha256'] = _leaf_checksum(leaf)
    for what, value in have.items():
      if value != expected[name][what]:
        raise UserError(
          f'checkpoint {path} is damaged: leaf {name!r} has {what} {value}; expected '
          f'{expected[name][what]}, as in its manifest.'
        )


# -- the directory -------------------------------------------------------------------------------


def _absolute(path: str | os.PathLike) -> Path:
  # Resolved, because a link to a checkpoint must survive that the checkpoint is replaced.
  try:
    return local_path(path, 'checkpoint').resolve()
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(f'{os.fspath(path)!r} is not a usable path: {error}.') from error


def _previous(path: Path) -> Path:
  return hidden_sibling(path, 'previous')


def _home(path: Path) -> Path:
  """Where the checkpoint lies: beside `path` if a kill fell between the two renames of a save."""
  return path if path.exists() or not _previous(path).exists() else _previous(path)


def _clean_up(path: Path) -> None:
  """Ends or takes back what a killed save began. Call with the lock held."""
  if (previous := _previous(path)).exists():
    if path.exists():
      shutil.rmtree(previous)
    else:
      previous.rename(path)
  prefix = hidden_sibling(path, 'saving-').name
  for entry in path.parent.iterdir():
    if entry.name.startswith(prefix):
      shutil.rmtree(entry, ignore_errors=True)


def _remove(directory: Path) -> None:
  # In a loop, because after a failed save Orbax's other threads may be writing for a while yet.
  for _ in range(40):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
      return
    time.sleep(0.05)


def _check_free(path: Path, overwrite: bool) -> None:
  if not path.exists():
    return
  if not overwrite:
    raise UserError(f'{path} exists; expected a new path, or overwrite=True.')
  if not (path / _MANIFEST).is_file():
    # Replacing means deleting, and this may be anything.
    raise UserError(f'{path} exists and is not a know_jax checkpoint; it is not replaced.')


def _check_space(directory: Path, tree: PyTree) -> None:
  """Takes the space that the weights can need, and gives it back.

  Orbax's threads, when they meet a full disk, write tracebacks to the terminal on their own.
  """
  leaves = jax.tree.leaves(tree)
  size = sum(leaf.nbytes for leaf in leaves) + 2**10 * len(leaves) + 2**17
  if not hasattr(os, 'posix_fallocate'):
    return  # macOS: Orbax finds out.
  reserve = directory / 'reserve'
  try:
    with reserve.open('wb') as file:
      os.posix_fallocate(file.fileno(), 0, size)
  except OSError as error:
    # Other errors are about one large file, or about a file system that cannot reserve.
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
  finally:
    reserve.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path) -> None:
  if not path.exists():
    temporary.rename(path)
    fsync_directory(path.parent)
    return
  # No portable call replaces a directory that is not empty. Between these two renames `_home`
  # finds the old checkpoint.
  previous = _previous(path)
  path.rename(previous)
  try:
    temporary.rename(path)
  except BaseException:
    previous.rename(path)
    raise
  fsync_directory(path.parent)
  shutil.rmtree(previous, ignore_errors=True)


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
  """Relative path and status of everything under a directory but directories; follows no links."""
  for directory, directories, files in os.walk(root, onerror=raise_error):
    for name in (*directories, *files):
      entry = Path(directory, name)
      status = entry.lstat()
      if not stat.S_ISDIR(status.st_mode):
        yield entry.relative_to(root).as_posix(), status


def _checksums(root: Path) -> dict[str, dict[str, Any]]:
  return {
    name: {'size': status.st_size, 'sha256': file_checksum(root / name)}
    for name, status in sorted(_walk(root))
  }


def _read_manifest(path: Path, home: Path) -> dict[str, Any]:
  if not home.exists():
    raise UserError(f'there is no checkpoint {path}.')
  if not (home / _MANIFEST).exists():
    raise UserError(f'{path} is not a know_jax checkpoint: it has no {_MANIFEST}.')
  manifest = read_sealed(home / _MANIFEST, 'manifest')
  if manifest.get('format') != FORMAT:
    raise UserError(
      f'{path} is not a know_jax checkpoint: its {_MANIFEST} has format '
      f'{manifest.get("format")!r}; expected {FORMAT!r}.'
    )
  if manifest.get('version') != VERSION:
    raise UserError(
      f'checkpoint {path} has format version {manifest.get("version")!r}; this version of know_jax '
      f'reads {VERSION}.'
    )
  if not _well_formed(manifest):
    raise UserError(f'checkpoint {path} has a malformed {_MANIFEST}.')
  # All files are read to compare their checksums, so they must not be of any size.
  size = sum(file['size'] for file in manifest['files'].values())
  if size > (most := 2 * _size(manifest['leaves']) + 2**12 * len(manifest['leaves']) + 2**20):
    raise UserError(f'checkpoint {path} has files of {size} bytes; expected at most {most}.')
  return manifest


def _size(leaves: dict[str, dict[str, Any]]) -> int:
  """The bytes of the leaves that a manifest describes."""
  return sum(
    math.prod(leaf['shape']) * np.dtype(leaf['dtype']).itemsize for leaf in leaves.values()
  )


def _well_formed(manifest: dict[str, Any]) -> bool:
  def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0

  try:
    return (
      isinstance(manifest['metadata'], dict)
      and all(
        all(map(is_count, leaf['shape']))
        and isinstance(leaf['sha256'], str)
        and np.dtype(leaf['dtype']).name == leaf['dtype']
        for leaf in manifest['leaves'].values()
      )
      and all(
        is_count(file['size']) and isinstance(file['sha256'], str)
        for file in manifest['files'].values()
      )
    )
  except (KeyError, TypeError, AttributeError, ValueError, SyntaxError):
    return False


def _check_files(path: Path, home: Path, expected: dict[str, dict[str, Any]]) -> None:
  damaged = f'checkpoint {path} is damaged: file '
  result = {name: status for name, status in _walk(home) if name != _MANIFEST}
  for name in sorted(result.keys() | expected.keys()):
    if name not in result:
      raise UserError(f'{damaged}{name!r} is missing.')
    if name not in expected:
      raise UserError(f'{damaged}{name!r} does not belong to it.')
    if not stat.S_ISREG(result[name].st_mode):
      raise UserError(f'{damaged}{name!r} is a link or a device; expected a plain file.')
    if (size := result[name].st_size) != expected[name]['size']:
      raise UserError(f'{damaged}{name!r} has {size} bytes; expected {expected[name]["size"]}.')
  for name, entry in expected.items():
    if (checksum := file_checksum(home / name)) != entry['sha256']:
      raise UserError(
        f'{damaged}{name!r} has been altered: it has SHA-256 {checksum}; expected '
        f'{entry["sha256"]}.'
      )


# -- Orbax ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax's log off the terminal: what fails in it is raised here, as one error."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  finally:
    logger.setLevel(level)


def _orbax_save(path: Path, directory: Path, tree: PyTree) -> None:
  import orbax.checkpoint as ocp

  try:
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(directory, tree)
  except OSError:
    raise
  except Exception as error:
    # TensorStore's errors hold that of the operating system in their text only.
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
      raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    raise UserError(f'Orbax cannot write {path}: {first_line(error)}') from error


def _orbax_restore(
  path: Path, directory: Path, expected: dict[str, dict[str, Any]], stored: int
) -> PyTree:
  import orbax.checkpoint as ocp

  if (size := _size(expected)) > (memory := memory_bytes()):
    raise UserError(f'checkpoint {path} holds {size} bytes; this machine has {memory}.')
  try:
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
      # Shapes first: reading allocates what they say.
      described = checkpointer.metadata(directory).item_metadata.tree
      _check_leaves(path, described, expected, checksums=False)
      _check_chunks(path, described, stored)
    with _quiet(), ocp.PyTreeCheckpointer() as reader:
      # Also what was saved from several devices, which need not be there.
      host = ocp.RestoreArgs(restore_type=np.ndarray)
      tree = reader.restore(directory, restore_args=jax.tree.map(lambda _: host, described))
    for name, leaf in trees.named_leaves(tree).items():
      if not isinstance(leaf, np.ndarray):
        raise UserError(
          f'checkpoint {path} is damaged: leaf {name!r} is of {type(leaf)}; expected an array.'
        )
    return tree
  except UserError:
    raise
  except Exception as error:
    # Every file is as it was written, so this is Orbax: say an older version than that which wrote.
    raise UserError(f'Orbax cannot read {path}: {first_line(error)}') from error


def _check_chunks(path: Path, described: PyTree, stored: int) -> None:
  """Refuses chunks larger than their leaf, and more of them than there are bytes in the files.

  TensorStore takes memory for a whole chunk at a time, and for every chunk there is; where there is
  none left the process ends.
  """
  for name, leaf in trees.named_leaves(described).items():
    shape, chunk = leaf.shape, leaf.storage.chunk_shape
    fits = all(0 < c <= max(s, 1) for s, c in zip(shape, chunk, strict=True))
    if not fits or math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True)) > stored:
      raise UserError(
        f'checkpoint {path} is damaged: leaf {name!r} of shape {list(shape)} is in chunks of '
        f'{list(chunk)}.'
      )
