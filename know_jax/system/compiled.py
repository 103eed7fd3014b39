"""Compiled programs: those that outlive their process, and those of which it has too many."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from know_jax.errors import UserError

MIN_SECONDS = 0.1
"""Compilations shorter than this are not worth a file."""


def keep_compiled(folder: str | os.PathLike | None = None) -> Path | None:
  """Has JAX keep compiled programs for later processes, on CPU, GPU and TPU alike.

  The first prediction in a process takes seconds, nearly all of which is compilation. After this
  call, a process reads what another has compiled. The commands make it by themselves.
  JAX's key for a program holds its own version, the devices, and the features of the processor, so
  that machines can share the folder.

  Args:
    folder: where they go; by default `$JAX_COMPILATION_CACHE_DIR`, else `jax` in `$KNOW_JAX_CACHE`
      (default `~/.cache/know_jax`).

  Returns:
    The folder; None where the default cannot be written, and nothing is kept.

  Raises:
    UserError: `folder` cannot be written.
  """
  base = os.environ.get('KNOW_JAX_CACHE') or '~/.cache/know_jax'
  default = os.environ.get('JAX_COMPILATION_CACHE_DIR') or f'{base}/jax'
  try:
    path = Path(default if folder is None else folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
      raise PermissionError
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory.
    if folder is None:
      return None
    raise UserError(
      f'cannot keep compiled programs in {folder}; expected a folder to write to.'
    ) from error
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
  compilation_cache.reset_cache()  # JAX asks once, at the first compilation, whether there is one.
  return path


def drop_programs() -> None:
  """Forgets the programs that were compiled in this process, once there are many.

  A process that trains one network after the other has some 1,500 memory maps more for each, until
  Linux gives no more (65,530 as it is set up) and the compiler dies of it. Before that, programs
  are kept: many of them are of any network.
  """
  try:
    maps = Path('/proc/self/maps').read_bytes().count(b'\n')
    most = int(_MOST_MAPS.read_text())
  except (OSError, ValueError):  # Not Linux.
    jax.clear_caches()
    return
  if maps > most // 4:
    jax.clear_caches()


_MOST_MAPS = Path('/proc/sys/vm/max_map_count')
